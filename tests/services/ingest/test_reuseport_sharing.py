import signal
import socket
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack

import pytest

from services.ingest.reuseport_sharing import Spreader, program
from tests.builders import BusEnds, freeze, take, take_mark
from tests.network import run_privileged
from tests.stack import Stack, wait_until
from tests.traffic import pause

WORKERS = 4
PORT = 6669
LIGHT = 1000
IPV6_FREEBIND = 78
"""linux/in6.h; the module has no name for it."""
STREAM = (
    '[ingest]\nspread = "{}"\n[[stream]]\nname = "messages"\nlisten = ["udp://127.0.0.1:6669", "udp://[::1]:6669"]\n'
)
SOURCES = [f"127.1.{number >> 8}.{number & 255}" for number in range(LIGHT)]

Send = Callable[[str, int], None]


class Site:
    """Workers that share addresses, and what each of them has taken."""

    def __init__(self, stack: Stack, bus: BusEnds, spread: str, workers: int = WORKERS) -> None:
        self._stack = stack
        self._subscriber = bus.subscriber("datagrams/")
        self._sockets = ExitStack()
        stack.configure(STREAM.format(spread))
        for number in range(workers):
            stack.start(f"ingest.{number + 1}")
        self.taken: dict[str, list[bytes]] = {}
        for _ in range(workers):
            self.receive()  # marks

    def receive(self) -> int:
        """Take one batch; return how many datagrams were in it."""
        message = take(self._subscriber)
        assert message.batch is not None
        payloads = self.taken.setdefault(message.envelope.sender, [])
        payloads += [payload for _, _, payload in message.batch.datagrams()]
        return len(message.batch)

    def export(self, sources: list[str], each: int, ports: int = 1) -> None:
        """Send so many numbered datagrams from each port of each source, and wait until all are taken."""
        family = socket.AF_INET6 if ":" in sources[0] else socket.AF_INET
        missing = 0
        for source in sources:
            with ExitStack() as opened:
                for _ in range(ports):
                    sock = opened.enter_context(socket.socket(family, socket.SOCK_DGRAM))
                    if family == socket.AF_INET6:
                        sock.setsockopt(socket.IPPROTO_IPV6, IPV6_FREEBIND, 1)
                    sock.bind((source, 0))
                    for number in range(each):
                        sock.sendto(b"%d" % number, ("::1" if family == socket.AF_INET6 else "127.0.0.1", PORT))
                        missing += 1
                        while missing > 500:
                            missing -= self.receive()
        while missing:
            missing -= self.receive()

    def assert_even(self) -> None:
        """No worker has taken more than half as much again as the mean."""
        counts = {name: len(payloads) for name, payloads in self.taken.items()}
        assert max(counts.values()) <= 1.5 * sum(counts.values()) / WORKERS, counts


@pytest.mark.parametrize("spread", ["flow", "source", "datagram"])
def test_many_light_exporters_are_spread_evenly(stack: Stack, bus: BusEnds, spread: str) -> None:
    """Of a thousand exporters with a few datagrams each no worker takes more than half as much again as the mean."""
    site = Site(stack, bus, spread)
    site.export(SOURCES, 3)
    site.assert_even()


def test_heavy_exporter_is_spread_by_datagram(stack: Stack, bus: BusEnds) -> None:
    """One exporter that sends most of all is shared evenly by all workers when datagrams are spread one by one."""
    site = Site(stack, bus, "datagram")
    site.export(["127.0.0.1"], 4000)
    site.assert_even()
    site.export(SOURCES, 1)
    site.assert_even()


@pytest.mark.parametrize("spread", ["flow", "source"])
def test_exporter_stays_with_its_worker(stack: Stack, bus: BusEnds, spread: str) -> None:
    """All that one port of an exporter sends is taken by one worker, in the order it was sent."""
    site = Site(stack, bus, spread)
    site.export(["127.0.0.1"], 2000)
    assert [payloads for payloads in site.taken.values() if payloads] == [[b"%d" % number for number in range(2000)]]


@pytest.mark.parametrize("prefix", ["127.2.0.", "fd00::"])
def test_source_is_its_address_whatever_its_ports(stack: Stack, bus: BusEnds, prefix: str) -> None:
    """Spread by source, all ports of an exporter go to one worker; 100 exporters go to all workers, IPv6 too."""
    run_privileged(["ip", "route", "replace", "local", "fd00::/64", "dev", "lo"])
    site = Site(stack, bus, "source")
    chosen = []
    for number in range(1, 101):
        site.taken.clear()
        site.export([f"{prefix}{number}"], 1, ports=8)
        chosen += [name for name, payloads in site.taken.items() if payloads]
    assert len(chosen) == 100, "an exporter went to several"
    assert set(Counter(chosen)) == {f"ingest.{number + 1}" for number in range(WORKERS)}


def test_workers_that_come_and_go_are_counted(stack: Stack, bus: BusEnds) -> None:
    """A worker that joins gets its share at once, and when one is killed the others soon share all evenly again."""
    site = Site(stack, bus, "datagram", workers=WORKERS - 1)
    stack.start(f"ingest.{WORKERS}")
    site.export(["127.0.0.1"], 2000)
    site.assert_even()
    stack["ingest.2"].stop(signal.SIGKILL)

    def even() -> bool:
        site.taken.clear()
        site.export(["127.0.0.1"], 600)
        counts = [len(payloads) for payloads in site.taken.values()]
        return len(counts) == WORKERS - 1 and max(counts) <= 1.5 * 600 / (WORKERS - 1)

    wait_until(even, "three share what four did")


def test_kernel_that_takes_no_program_is_told_of(capfd: pytest.CaptureFixture[str], lab: None) -> None:
    """A socket that the kernel takes no program for is left to the kernel, and the worker says so, once."""

    class Refusing(socket.socket):
        def setsockopt(self, *arguments: object) -> None:  # noqa: ARG002
            raise OSError(22, "Invalid argument")

    with Refusing(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        socket.socket.setsockopt(sock, socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(("127.0.0.1", 0))
        spreader = Spreader("datagram")
        spreader.add(sock)
        spreader.renew()
        spreader.renew()
    assert capfd.readouterr().out.count("Invalid argument") == 1


@pytest.mark.parametrize("spread", ["source", "datagram"])
def test_program_jumps_no_further_than_its_end(spread: str) -> None:
    """Every jump of a program ends at one of its instructions, the last of which returns."""
    code = program(spread, 3)  # type: ignore[arg-type]
    for place, (operation, yes, no, operand) in enumerate(code):
        if operation & 7 == 5:
            assert place + 1 + max(yes, no, operand if operation == 5 else 0) < len(code)
    assert code[-1][0] == 0x16


@pytest.mark.parametrize(
    ("spread", "listen", "to"),
    [
        ("flow", "udp://127.0.0.1:6669", "127.0.0.1"),
        ("flow", "udp://[::]:6669", "127.0.0.1"),
        ("source", "udp://[::]:6669", "::1"),
        ("source", "udp://0.0.0.0:6669", "127.0.0.1"),
        ("datagram", "udp://127.0.0.1:6669", "127.0.0.1"),
    ],
)
def test_workers_that_drain_leave_their_share_to_others(
    stack: Stack, bus: BusEnds, spread: str, listen: str, to: str
) -> None:
    """Every datagram that is sent while workers end, one after the other, is published once, by them or by the last."""
    stack.configure(f'[ingest]\nspread = "{spread}"\n[[stream]]\nname = "messages"\nlisten = ["{listen}"]\n')
    for number in range(3):
        stack.start(f"ingest.{number + 1}")
    subscriber = bus.subscriber("datagrams/")
    for _ in range(3):
        take_mark(subscriber)
    taken, sent = Counter[bytes](), 0
    with ExitStack() as opened:
        family = socket.AF_INET6 if ":" in to else socket.AF_INET
        exporters = [opened.enter_context(socket.socket(family, socket.SOCK_DGRAM)) for _ in range(64)]
        for number, sock in enumerate(exporters):
            if family == socket.AF_INET:
                sock.bind((SOURCES[number], 0))
            sock.connect((to, PORT))

        def receive() -> int:
            while message := subscriber.receive():
                if message.batch is not None:
                    taken.update(payload for *_, payload in message.batch.datagrams())
            return taken.total()

        def send_until(condition: Callable[[], object]) -> None:
            nonlocal sent
            while not condition():
                for sock in exporters:
                    sock.send(b"%d" % sent)
                    sent += 1
                pause(0.002)
                receive()

        send_until(lambda: len(taken) > 500)
        for name in ("ingest.2", "ingest.1"):
            ending, enough = stack[name].process, sent + 6000  # a queue, so that draining takes a while
            freeze(stack[name])
            send_until(lambda enough=enough: sent > enough)  # type: ignore[misc]
            for number in (signal.SIGTERM, signal.SIGCONT):
                ending.send_signal(number)
            send_until(lambda ending=ending: ending.poll() is not None)  # type: ignore[misc]
        enough = sent + 500
        send_until(lambda enough=enough: sent > enough)  # type: ignore[misc]
        wait_until(lambda: receive() >= sent, lambda: f"{taken.total()} of {sent} are published")
    assert taken == Counter(b"%d" % number for number in range(sent))
