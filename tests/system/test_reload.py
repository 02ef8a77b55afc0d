"""SIGHUP to every service: streams and collectors come and go, and what did not change goes on."""

import random
import signal
import socket
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from shared.log import WORKER_CAME, WORKER_GONE
from tests.background import Background, Reading
from tests.builders import BusEnds, accounts_when
from tests.openly import OpenStack
from tests.stack import PATIENT, Running, Stack, ask_json, sign_up, wait_until
from tests.traffic import exporters, open_receiver, pause

A = f'{PATIENT}[[stream]]\nname = "a"\nlisten = ["udp://127.0.0.1:7000"]\n'
B = '[[stream]]\nname = "b"\nlisten = ["udp://127.0.0.1:7001", "tcp://127.0.0.1:7001"]\n'
C = '[[stream]]\nname = "c"\nlisten = ["udp://127.0.0.1:7002"]\nreply = "yes"\n'
SIEM = '[[collector]]\nname = "siem"\nstreams = ["b"]\naddress = "127.0.0.1"\nport = 9103\n'
SOME = '[[collector]]\nname = "some"\nstreams = ["*"]\naddress = "127.0.0.1"\nport = 9104\nfrom = ["127.0.1.2"]\n'
CYCLE = (A + B, A + B + SIEM, A + C + SOME, A + B + C + SIEM + SOME, A + "[[stream]]\n", A)
"""Settings that follow one another; the last but one can't be used."""
SERVICES = ("gateway", "forwarder", "ingest.1", "ingest.2")


class Reader(Reading):
    """A collector that takes all that comes, until the test is over."""

    def __init__(self, port: int) -> None:
        super().__init__(open_receiver("127.0.0.1", port)[0])
        self.came: list[bytes] = []

    def take(self, payload: bytes, _peer: Any) -> None:
        """Take a datagram."""
        self.came.append(payload)

    def wait_for(self, datagram: bytes, sock: socket.socket) -> None:
        """Send a datagram until it comes: the subscription to a new stream is on its way when the reload is said."""

        def came() -> bool:
            sock.send(datagram)
            pause(0.02)
            return datagram in self.came

        wait_until(came, f"{datagram!r} arrives")

    def wait_for_all(self, exporters: int, sent: int) -> None:
        """Wait until as many datagrams of stream a have come as were sent."""
        wait_until(lambda: sum(map(len, self.numbers().values())) >= exporters * sent, "all has come")

    def numbers(self) -> dict[int, list[int]]:
        """The numbers that came of stream a, by exporter, in the order in which they came."""
        found = defaultdict(list)
        for datagram in list(self.came):
            if datagram[:1] == b"a":
                found[datagram[1]].append(int.from_bytes(datagram[2:]))
        return found


class Load(Background):
    """Sends numbered datagrams to stream a, one after the other of each exporter, until told to stop."""

    def __init__(self, sources: list[socket.socket]) -> None:
        super().__init__()
        self._sources = sources
        self.sent = 0

    def run(self) -> None:
        """Send rounds, at a rate that no buffer is too small for."""
        while not self.stopping.is_set():
            for exporter, sock in enumerate(self._sources):
                sock.send(b"a" + exporter.to_bytes(1) + self.sent.to_bytes(4))
            self.sent += 1
            pause(0.03)


@contextmanager
def running(*threads: Reader | Load) -> Iterator[None]:
    """Run threads, and end them."""
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        for thread in threads:
            thread.close() if isinstance(thread, Reader) else thread.stop()


def is_free(port: int) -> bool:
    """Return whether nobody listens on a UDP and TCP port: it can be had without sharing."""
    with ExitStack() as probes:
        try:
            for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM):
                probe = probes.enter_context(socket.socket(socket.AF_INET, kind))
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(kind == socket.SOCK_STREAM))
                probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def open_files(stack: Stack) -> list[int]:
    """Return the number of files that each service has open."""
    return [len(list(Path(f"/proc/{stack[name].process.pid}/fd").iterdir())) for name in SERVICES]


def settled_files(stack: Stack) -> list[int]:
    """Return the files that each service has open once their number stays: a connection or a journal is soon gone."""
    seen = [open_files(stack)]

    def settled() -> bool:
        seen.append(open_files(stack))
        return seen[-20:] == seen[-1:] * 20

    wait_until(settled, lambda: f"descriptors come and go: {seen[-20:]}")
    return seen[-1]


def check_others(stack: Stack, settings: str, everything: Reader, mark: bytes) -> None:
    """Streams b and c work where they are in the settings, and their ports are free where they are not."""
    for port, there in ((7001, B in settings), (7002, C in settings)):
        if there:
            with exporters(1, port) as (sock,):
                everything.wait_for(mark + b"%d" % port, sock)
        else:
            wait_free(port)


def wait_free(port: int, *, free: bool = True) -> None:
    """Wait until a port is free, or listened on."""
    wait_until(lambda: is_free(port) == free, f"port {port} is {'free' if free else 'listened on'}")


def take_over(name: str) -> list[str]:
    """The refusals of whoever would take a collector of the settings over, or off the list."""
    attempts: list[dict[str, Any]] = [
        {"op": "register", "name": name, "streams": ["a"], "port": 9999, "take_over": True},
        {"op": "register", "name": name, "streams": ["a"], "port": 9999},
        *({"op": op, "name": name, "generation": number} for op in ("leave", "renew") for number in (0, 1)),
    ]
    return [ask_json(attempt)["error"] for attempt in attempts]


def test_streams_that_did_not_change_lose_nothing(stack: Stack) -> None:
    """Reloads in any order, a bad file among them: of stream a all arrives, once, in order; the accounts add up."""
    stack.configure(A)
    stack.start_all(ingest=2)
    rng = random.Random(5)
    one, everything, siem, some = (Reader(port) for port in (9101, 9102, 9103, 9104))
    with exporters(4, 7000) as sources:
        load = Load(sources)
        with running(one, everything, siem, some):
            sign_up({"name": "one", "streams": ["a"], "port": 9101})
            sign_up({"name": "everything", "streams": ["*"], "port": 9102})
            with running(load):
                before: list[int] = []
                for number in range(3 * len(CYCLE)):
                    settings = CYCLE[number % len(CYCLE)]
                    stack.configure(settings)
                    good = settings != CYCLE[-2]
                    for name in rng.sample(SERVICES, 4):
                        said = stack[name].reload()
                        assert said["level"] == ("info" if good else "error"), said
                    check_others(stack, settings if good else CYCLE[-3], everything, b"%d:" % number)
                    if good and SIEM in settings:
                        assert take_over("siem") == ["not_permitted", "name_taken", *["not_permitted"] * 4]
                        assert ask_json({"op": "list"})["clients"]["siem"]["port"] == 9103
                    if number == len(CYCLE) - 1:  # a stream that was there once keeps its account and pool
                        before = settled_files(stack)
            for reader in (one, everything):
                reader.wait_for_all(4, load.sent)
            wait_until(
                lambda: open_files(stack) == before, lambda: f"{open_files(stack)} descriptors, as before: {before}"
            )
            ledger = stack.operator("ledger")
            assert ledger.process.wait(60) == 0, ledger.text
    for reader in (one, everything):
        for exporter, numbers in reader.numbers().items():
            assert numbers == list(range(load.sent)), (
                exporter,
                [gap for gap in pairwise(numbers) if gap[1] != gap[0] + 1],
            )
    assert set(some.numbers()) == {1}
    assert any(datagram.endswith(b":7001") for datagram in siem.came)
    for name in SERVICES:
        assert stack[name].stop() == 0


def test_last_of_many_hangups_counts(stack: Stack) -> None:
    """SIGHUP after SIGHUP, without waiting: what the file said last is in effect in the end."""
    stack.configure(A)
    stack.start_all()
    for settings in (A + B, A, A + B + C, A + C):
        stack.configure(settings)
        for running in stack.running:
            running.process.send_signal(signal.SIGHUP)
    for port in (7000, 7001, 7002):
        wait_free(port, free=port == 7001)
    wait_until(lambda: sorted(ask_json({"op": "streams"})["streams"]) == ["a", "c"], "the gateway knows a and c")
    wait_until(lambda: stack["broker"].reloads, "the broker says that there is nothing to reload")
    assert all("nothing to reload" in said["event"] for said in stack["broker"].reloads)
    for running in stack.running:
        assert not running.events("drained")
        assert running.process.poll() is None


def lines_of(service: Running) -> list[str]:
    """Return what it has printed, but for workers that report late on a busy machine."""
    return [line for line in service.text.splitlines() if WORKER_CAME not in line and WORKER_GONE not in line]


def test_bad_file_keeps_the_old_settings(stack: Stack) -> None:
    """Settings that can't be used cost one line at each service, which goes on as before."""
    stack.configure(A)
    stack.start_all()
    for text, says in (
        ("[[stream]\n", "not TOML"),
        ("[ingest]\ncolour = 1\n", "[ingest] colour: unknown key"),
        ('[[stream]]\nname = "a"\nlisten = 5\n', '[[stream]] "a" listen: expected'),
        (A + SIEM.replace('"b"', '"x"'), "there is no stream 'x'; name a [[stream]]"),
    ):
        stack.configure(text)
        for name in ("broker", "gateway", "forwarder", "ingest.1"):
            lines = len(lines_of(stack[name]))
            said = stack[name].reload()
            assert said["event"].startswith(f"not reloaded, the old settings stay: {stack.directory}/fanwire.toml: ")
            assert says in said["event"]
            assert len(lines_of(stack[name])) == lines + 1
            assert stack[name].process.poll() is None
        assert list(ask_json({"op": "streams"})["streams"]) == ["a"]


def test_what_takes_a_restart_is_said(stack: Stack) -> None:
    """Other settings that have changed are named, and not followed; streams beside them are."""
    stack.configure(A)
    stack.start_all()
    stack.configure(A.replace(PATIENT, '[gateway]\nserve_seconds = 10\nlisten = ["tcp://127.0.0.1:5005"]\n') + B)
    for name in ("broker", "gateway", "forwarder", "ingest.1"):
        assert stack[name].reload()["level"] == "info"
        (said,) = stack[name].events("these settings have changed too, but need a restart")
        assert said["settings"] == ["gateway.listen"]
    assert sorted(ask_json({"op": "streams"})["streams"]) == ["a", "b"]


@pytest.mark.parametrize(
    ("collector", "says"),
    [
        (
            SIEM.replace('"b"', '"a"').replace("9103", "7000"),
            '"siem": 127.0.0.1 port 7000 is one of fanwire\'s own',
        ),
        (SIEM.replace('"b"', '"a"').replace('"127.0.0.1"', '"127.255.255.255"'), '"siem": address: 127.255.255.255'),
    ],
)
def test_bad_collector_keeps_the_old_ones(stack: Stack, collector: str, says: str) -> None:
    """A collector of the settings that can't be admitted keeps all of the old settings at the gateway."""
    stack.configure(A + B + SIEM)
    stack.start_all()
    stack.configure(A + SOME + collector)
    said = stack["gateway"].reload()["event"]
    assert said.startswith("not reloaded, the old settings stay: [[collector]] ")
    assert says in said
    assert sorted(ask_json({"op": "streams"})["streams"]) == ["a", "b"]
    assert list(ask_json({"op": "list"})["clients"]) == ["siem"]
    stack.configure(A + SOME)
    assert stack["gateway"].reload()["changed"] == ["stream b", "collector siem", "collector some"]
    assert list(ask_json({"op": "list"})["clients"]) == ["some"]


def test_client_of_a_stream_that_is_gone_stays(stack: Stack) -> None:
    """A client of a stream that goes keeps the entry, and gets copies again when the stream is back."""
    stack.configure(A + B)
    stack.start_all()
    reader = Reader(9101)
    with running(reader), exporters(1, 7001) as (sock,):
        signed = sign_up({"name": "one", "streams": ["b"], "port": 9101})
        for settings in (A, A + B):
            stack.configure(settings)
            for name in ("gateway", "forwarder", "ingest.1"):
                stack[name].reload()
            assert ask_json({"op": "renew", "name": "one", "generation": signed["generation"]})["ok"]
            other = {"op": "register", "name": "two", "streams": ["b"], "port": 9105}
            assert ask_json(other).get("error") == (None if B in settings else "unknown_stream")
        reader.wait_for(b"back", sock)


def test_transmitter_follows_streams_and_listeners(open_stack: OpenStack) -> None:
    """Copies with the exporter's address begin with a new stream, and never go to a new listener of ours.

    Who signed up there while it was none is refused by the transmitter, and taken off the list by the gateway.
    """
    stack = open_stack
    stack.configure(A)
    for name in ("broker", "gateway", "forwarder", "transmitter", "ingest"):
        stack.start(name)
    with exporters(1, 7001) as (sock,), exporters(1, 7000) as (other,):
        reader = Reader(9101)
        with running(reader):
            for name, port in (("one", 9101), ("loop", 7002)):
                sign_up({"name": name, "streams": ["*"], "port": port, "source": "original"})
            stack.configure(A + B + C)
            for name in ("transmitter", "ingest"):
                assert stack[name].reload()["level"] == "info", name
            sock.send(b"of b")
            other.send(b"of a")
            wait_until(lambda: sorted(reader.came) == [b"of a", b"of b"], "copies of both streams")

    with BusEnds(stack.bus) as bus:  # what would have come back to us is refused
        loop = "collector/loop"
        accounts_when(bus, "transmitter.1", lambda found: found[loop].get("dropped_destination_refused") == 2)
    assert stack["gateway"].reload()["level"] == "info"
    assert list(ask_json({"op": "list"})["clients"]) == ["one"]
    (said,) = stack["gateway"].events("collector removed: its address is one of fanwire's own listeners (loop)")
    assert said["clients"] == ["loop"]
