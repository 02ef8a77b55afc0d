"""Copies that keep the exporter's address, from exporters on other hosts to collectors on other hosts."""

import json
import os
import random
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.capture import Capture, Collector, Receiver, assert_complete
from tests.network import HERE, End, Host, tunnel, veth
from tests.openly import NOBODY, OpenStack
from tests.services.transmitter.started import as_nobody
from tests.stack import ask_json, sign_up, wait_until
from tests.system.test_workers import reports

SETTINGS = """
[gateway]
destinations = ["10.0.0.0/8", "fd00::/8"]
serve_seconds = 10
[[stream]]
name = "messages"
listen = ["udp://[::]:6667", "tcp://[::]:6667"]
"""
Source = tuple[str, int]
Sent = dict[Source, list[bytes]]
SIZES = (1, 2, 99, 100, 100, 100, 100, 1200, 1232, 1233, 1452, 1453, 1472, 1473, 1464, 1464, 1464, 4000, 9001)


class Exporters:
    """Sockets on a host, each with an address and port of its own, sending to the relay; `sent` is what each has."""

    def __init__(self, host: Host, sources: Sequence[Source], relay: str) -> None:
        self.sent: Sent = {source: [] for source in sources}
        self._sockets: dict[Source, socket.socket] = {}
        for source in sources:
            family = socket.AF_INET6 if ":" in source[0] else socket.AF_INET
            sock = self._sockets[source] = host.socket(family, socket.SOCK_DGRAM)
            sock.bind(source)
            sock.connect((relay, 6667))

    def send(self, source: Source, payload: bytes) -> None:
        """Send a datagram."""
        self._sockets[source].send(payload)
        self.sent[source].append(payload)

    def send_sizes(self, sizes: Sequence[int]) -> None:
        """Send a datagram of each size from each exporter, in bursts, the exporters in random turns."""
        draw = random.Random(1)
        left = {source: list(sizes) for source in self._sockets}
        while left:
            source = draw.choice(list(left))
            for _ in range(draw.randint(1, 6)):
                if left[source]:
                    self.send(source, draw.randbytes(left[source].pop(0)))
                    time.sleep(0.0002)  # buffers of a plain user are small
            if not left[source]:
                del left[source]

    def __enter__(self) -> "Exporters":
        return self

    def __exit__(self, *_: object) -> None:
        for sock in self._sockets.values():
            sock.close()


def register(relay: Host, address: str, port: int, name: str, **fields: Any) -> dict[str, Any]:
    """Sign up a collector, for copies with the exporter's address; return its entry once copies flow to it."""
    request = {"name": name, "streams": ["messages"], "source": "original", "address": address, "port": port}
    with relay.entered():
        return sign_up(request | fields)


@contextmanager
def small_site(open_stack: OpenStack, settings: str = SETTINGS) -> Iterator[tuple[Host, Host, Host]]:
    """A field with exporters, a relay, and a collectors' host, in that order: 10.1.0.0/24 and 10.2.0.0/24."""
    open_stack.configure(settings)
    with (
        Host() as field,
        Host() as relay,
        Host() as siem,
        veth(End(field, "eth", "10.1.0.2/24"), End(relay, "field", "10.1.0.1/24")),
        veth(End(relay, "siem", "10.2.0.1/24"), End(siem, "eth", "10.2.0.2/24")),
    ):
        field.run("ip", "address", "add", "10.1.0.3/24", "dev", "eth")
        with relay.entered():
            open_stack.start_all()
        yield field, relay, siem


EXPORTERS = [("10.1.0.2", 5000), ("10.1.0.3", 5001), ("10.1.0.3", 5002)]


def account(open_stack: OpenStack, relay: Host, name: str) -> dict[str, int]:
    """The transmitter's account of that name."""
    with relay.entered():
        return reports(open_stack)["transmitter.1"].get(name, {})


def number_of(payload: bytes) -> int:
    """The number that a datagram of the flood carries."""
    return int.from_bytes(payload[:4])


class Flood(threading.Thread):
    """Exporters sending numbered datagrams in turns, at about a rate, until told to stop.

    None is sent while `may_send` says no of the number sent before.
    """

    def __init__(
        self, exporters: Exporters, per_second: float, may_send: Callable[[int], bool] = lambda _: True
    ) -> None:
        super().__init__(daemon=True)
        self._exporters = exporters
        self._pause = 1 / per_second
        self._may_send = may_send
        self._stopping = threading.Event()
        self.sent = 0

    def run(self) -> None:
        """Send, catching up where this thread did not get its turn in time."""
        began = time.monotonic()
        while not self._stopping.is_set():  # asked each time: it may never catch up
            if self.sent * self._pause < time.monotonic() - began and self._may_send(self.sent):
                self._exporters.send(EXPORTERS[self.sent % len(EXPORTERS)], self.sent.to_bytes(4) + bytes(96))
                self.sent += 1
            else:
                time.sleep(0.001)

    def stop(self) -> int:
        """Stop, and return how many were sent."""
        self._stopping.set()
        self.join()
        return self.sent


@pytest.mark.parametrize("mtu", [1500, 1280])
@pytest.mark.parametrize("version", [4, 6])
def test_each_collector_gets_every_datagram_from_its_exporter(open_stack: OpenStack, version: int, mtu: int) -> None:
    """On a link, behind a router, on a link without Ethernet and on this host: all datagrams, sources, order, sums."""
    four = version == 4

    def at(number: int, host: int) -> str:
        return f"10.{number}.0.{host}" if four else f"fd00:{number}::{host}"

    def end(number: int, host: int, name: str, where: Host) -> End:
        return End(where, name, f"{at(number, host)}/{24 if four else 64}")

    open_stack.configure(SETTINGS)
    with ExitStack() as opened:
        field, relay, near, router, far, over = (opened.enter_context(Host()) for _ in range(6))
        for link in (
            veth(end(1, 2, "eth", field), end(1, 1, "field", relay), mtu),
            veth(end(2, 1, "near", relay), end(2, 2, "eth", near), mtu),
            veth(end(3, 1, "up", relay), end(3, 9, "down", router), mtu),
            veth(end(4, 9, "far", router), end(4, 2, "eth", far), mtu),
            tunnel(end(5, 1, "tun", relay), end(5, 2, "tun", over), mtu),
        ):
            opened.enter_context(link)
        router.forward()
        relay.route(f"{at(4, 0)}/{24 if four else 64}", via=at(3, 9))
        far.route(f"{at(3, 0)}/{24 if four else 64}", via=at(4, 9))
        sources = [(at(1, 100 + number), 1000 + number % 3) for number in range(6)]
        for address in sorted({address for address, _ in sources}):
            field.add_address(f"{address}/{24 if four else 64}", "eth")
        with relay.entered():
            open_stack.start_all()
            open_stack.start("transmitter")
        receivers: list[Receiver[Any]] = []
        for host, number, interface in ((near, 2, "eth"), (far, 4, "eth"), (over, 5, "tun")):
            receivers.append(opened.enter_context(Capture(host, interface)))
            receivers.append(opened.enter_context(Collector(host, at(number, 2), 9514)))
            with host.entered():  # after a conversation the relay's kernel knows the way, and no probe is captured
                socket.create_connection((at(3 if host is far else number, 1), 6667), timeout=60).close()
            register(relay, at(number, 2), 9514, f"on{number}")
        receivers.append(opened.enter_context(Collector(relay, at(2, 1), 9515)))
        register(relay, at(2, 1), 9515, "here")
        with opened.enter_context(Exporters(field, sources, at(1, 1))) as exporters:
            exporters.send_sizes(SIZES)
            count = len(SIZES) * len(sources)
            arrived: list[list[Any]] = [[] for _ in receivers]
            for number, receiver in enumerate(receivers):
                arrived[number] += receiver.read(count)
            for size in (65_507, 40_000):
                exporters.send(sources[0], random.Random(size).randbytes(size))
                for number, receiver in enumerate(receivers):
                    arrived[number] += receiver.read(1)
            for number, receiver in enumerate(receivers):
                assert_complete(arrived[number], exporters.sent)
                receiver.assert_quiet(0.1)


def test_transmitter_holds_no_privilege(open_stack: OpenStack) -> None:
    """The process that reads the bus has no capability in any set, can gain none, is not root, and says so.

    It leaves no core dump, and nobody of its own user can look into it.
    """
    with small_site(open_stack) as (_, relay, _), relay.entered():
        running = open_stack.start("transmitter")
        status = dict(
            line.split(":\t") for line in Path(f"/proc/{running.process.pid}/status").read_text().splitlines()
        )
        for name in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
            assert int(status[name], 16) == 0, name
        assert status["NoNewPrivs"] == "1"
        assert "0" not in status["Uid"].split()
        assert re.search(
            r"^Max core file size +0 +0 ", Path(f"/proc/{running.process.pid}/limits").read_text(), re.MULTILINE
        )
        looking = ["cat", f"/proc/{running.process.pid}/environ"]  # takes what ptrace(2) and pidfd_getfd(2) take, too
        same_user = subprocess.run(looking, preexec_fn=as_nobody, capture_output=True, text=True, check=False)
        assert "Permission denied" in same_user.stderr
        facts = reports(open_stack)["transmitter.1"]["transmitter"]
        assert (facts["capabilities"], facts["no_new_privs"]) == (0, 1)
        assert facts["raw_sockets"] > 0
        assert facts["uid"] == int(status["Uid"].split()[0])


def test_nobody_but_the_opener_ever_has_a_capability(open_stack: OpenStack) -> None:
    """Of services that a plain user runs no thread has a capability in any set, while copies of both kinds flow."""
    if os.geteuid() == 0:
        os.chown(open_stack.directory, NOBODY, NOBODY)  # where the bus directory is made
    for name in ("broker", "gateway", "forwarder", "ingest"):
        open_stack.start_without_privilege(name)
    open_stack.start("transmitter")
    with Collector(HERE, "127.0.0.1", 9514) as collector, Exporters(HERE, [("127.0.0.2", 0)], "127.0.0.1") as exporters:
        for source in ("relay", "original"):
            sign_up({"name": source, "streams": ["messages"], "port": 9514, "source": source})
        exporters.send(("127.0.0.2", 0), b"both ways")
        assert {arrival.source for arrival in collector.read(2)} == {"127.0.0.1", "127.0.0.2"}
    for running in open_stack.running:
        for status in Path(f"/proc/{running.process.pid}/task").glob("*/status"):
            sets = re.findall(r"^(Cap(?:Inh|Prm|Eff|Amb)):\s*(\w+)$", status.read_text(), re.MULTILINE)
            assert [(name, int(held, 16)) for name, held in sets] == [(name, 0) for name, _ in sets], running.name
            assert len(sets) == 4


def test_a_filter_at_the_collector_is_told_of_beforehand(open_stack: OpenStack) -> None:
    """A collector's host that checks reverse paths drops copies, and it alone knows: doctor says where to look."""
    with small_site(open_stack) as (field, relay, siem), Collector(siem, "10.2.0.2", 9514) as collector:
        with relay.entered():
            open_stack.start("transmitter")
        register(relay, "10.2.0.2", 9514, "siem")
        siem.sysctl("net.ipv4.conf.eth.rp_filter", 1)
        with Exporters(field, EXPORTERS[:1], "10.1.0.1") as exporters:
            exporters.send(EXPORTERS[0], b"filtered")
            wait_until(lambda: siem.counters()["TcpExtIPReversePathFilter"], "its kernel has dropped it")
            assert account(open_stack, relay, "collector/siem")["sent"] == 1
            with relay.entered():
                doctor = open_stack.operator("doctor", "--json")
            doctor.process.wait(60)
            (found,) = [each for each in json.loads(doctor.text)["findings"] if each["name"] == "reverse_path_there"]
            assert (found["level"], found["subject"]) == ("warning", "siem")
            assert "rp_filter" in found["cure"]
            siem.sysctl("net.ipv4.conf.eth.rp_filter", 0)
            exporters.send(EXPORTERS[0], b"let in")
            assert [each.payload for each in collector.read(1)] == [b"let in"]


@pytest.mark.parametrize("source", ["relay", "original"])
def test_copies_end_with_the_lease(open_stack: OpenStack, source: str) -> None:
    """Nobody tells us of a dead collector: once it renews its lease no more it gets nothing; another one gets all."""
    with (
        small_site(open_stack) as (field, relay, siem),
        Collector(siem, "10.2.0.2", 9601) as dead,
        Collector(siem, "10.2.0.2", 9602) as alive,
        Exporters(field, EXPORTERS[:1], "10.1.0.1") as exporters,
    ):
        with relay.entered():
            open_stack.start("transmitter")
        register(relay, "10.2.0.2", 9601, "dead", source=source, ttl=60)
        generation = register(relay, "10.2.0.2", 9602, "alive", source=source, ttl=60)["generation"]

        def copied_to_the_dead() -> int:
            with relay.entered():
                assert ask_json({"op": "renew", "name": "alive", "generation": generation})["ok"]
            exporters.send(EXPORTERS[0], b"going on")
            assert len(alive.read(1)) == 1
            time.sleep(0.05)
            return len(list(dead.take()))

        wait_until(copied_to_the_dead, "it gets copies")
        last = {
            "streams": ["messages"],
            "address": "10.2.0.2",
            "port": 9601,
            "source": source,
            "ttl": 2,
            "take_over": True,
        }
        with relay.entered():
            assert ask_json({"op": "register", "name": "dead"} | last)["ok"]
        wait_until(lambda: not copied_to_the_dead(), "copies to the dead collector end")
        assert not any(copied_to_the_dead() for _ in range(10))
        with relay.entered():
            assert list(ask_json({"op": "list"})["clients"]) == ["alive"]


def test_killed_transmitter_resumes_and_the_gap_is_counted(open_stack: OpenStack) -> None:
    """SIGKILL under load: no copy from another address; once it is back copies go on, and what it missed is known."""
    with small_site(open_stack) as (field, relay, siem), Collector(siem, "10.2.0.2", 9514) as collector:
        with relay.entered():
            open_stack.start("transmitter")
        register(relay, "10.2.0.2", 9514, "c")
        with Exporters(field, EXPORTERS, "10.1.0.1") as exporters:
            flood = Flood(exporters, 3000)
            flood.start()
            before = collector.read(3000)
            with relay.entered():
                open_stack["transmitter"].stop(signal.SIGKILL)
                stopped_at = flood.sent
                open_stack.start("transmitter")
            after = collector.read(6000)
            flood.stop()
            time.sleep(0.3)
            after += collector.take()
        by_source: dict[tuple[str, int], list[int]] = {}
        for arrival in (*before, *after):
            by_source.setdefault((arrival.source, arrival.source_port), []).append(number_of(arrival.payload))
        assert set(by_source) == set(EXPORTERS), "a copy came from somebody else"
        for came in by_source.values():
            assert came == sorted(set(came)), "out of order, or twice"
            assert sum(later - number != 3 for number, later in pairwise(came)) <= 1, "more than one gap"
            assert came[-1] > stopped_at
        counts = account(open_stack, relay, "collector/c")
        assert counts["expected"] == counts["offered"] + counts.get("missed", 0) + counts.get("dropped_unserved", 0)


def test_without_privilege_it_stays_and_says_so(open_stack: OpenStack) -> None:
    """Without raw sockets `original` gets `no_transmitter`, all else works; once there are some, so does that."""
    with small_site(open_stack) as (field, relay, siem), Collector(siem, "10.2.0.2", 9514) as collector:
        with relay.entered():
            without = open_stack.start_without_privilege()
        (said,) = (entry["event"] for entry in without.log if entry["level"] == "warning")
        assert all(cure in said for cure in ("CAP_NET_RAW", "systemd", "setpriv", "unshare -Urn"))
        with relay.entered():
            refused = ask_json(
                {"op": "register", "name": "c", "streams": ["messages"], "port": 9, "source": "original"}
            )
        assert (refused["ok"], refused["error"]) == (False, "no_transmitter")
        assert "transmitter" in refused["message"]
        register(relay, "10.2.0.2", 9514, "r", source="relay")
        with Exporters(field, EXPORTERS[:1], "10.1.0.1") as exporters:
            exporters.send(EXPORTERS[0], b"relayed")
            assert [arrival.payload for arrival in collector.read(1)] == [b"relayed"]
            assert without.process.poll() is None
            with relay.entered():
                assert without.stop() == 0
                open_stack.start("transmitter")
            register(relay, "10.2.0.2", 9514, "c")
            exporters.send(EXPORTERS[0], b"both ways")
            assert {arrival.source for arrival in collector.read(2)} == {"10.1.0.2", "10.2.0.1"}
