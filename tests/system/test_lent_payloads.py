"""Payloads that ingest lends in shared memory, with the real processes: whoever stops, goes or comes back."""

import hashlib
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from shared.bus.messages import Status
from shared.bus.status import Reports
from shared.ledger.accounts import Accounts
from shared.ledger.equations import discrepancies, dropped
from shared.net.sockets import kernel_drops
from tests.background import Reading
from tests.builders import BusEnds, freeze, kill_all
from tests.stack import Running, Stack, sign_up, wait_until
from tests.traffic import exporters, open_receiver, pause

EXPORTERS = 6
SIZES = (1400, 1401, 8192, 8193, 20_000, 65_507)
"""Of one exporter each, changed now and then: equal ones, ragged ones, and some longer than those before."""
HEAD = 6


def payload(exporter: int, number: int) -> bytes:
    """The datagram of a number: its digest over and over, so that every byte tells of which datagram it is."""
    size = SIZES[0] if number // 100 % 3 == 0 else SIZES[(exporter + number // 10) % len(SIZES)]
    head = exporter.to_bytes(2) + number.to_bytes(4)
    return (head + hashlib.sha256(head).digest() * (size // 32 + 1))[:size]


class Sink(Reading):
    """A collector that checks every copy when it comes."""

    def __init__(self, port: int) -> None:
        super().__init__(open_receiver("127.0.0.1", port, 1 << 28)[0])
        self.came: list[list[int]] = [[] for _ in range(EXPORTERS)]
        self.wrong: list[bytes] = []

    @property
    def count(self) -> int:
        """Copies so far."""
        return sum(map(len, self.came)) + len(self.wrong)

    @property
    def lost(self) -> int:
        """Copies so far that the kernel has dropped, as this thread did not read fast enough for its receive buffer."""
        return kernel_drops(self.socket)

    def quiet(self, seconds: float) -> bool:
        """Return whether nothing comes for a while."""
        before = self.count
        time.sleep(seconds)
        return self.count == before

    def take(self, copy: bytes, _peer: Any) -> None:
        """Check a copy."""
        exporter, number = int.from_bytes(copy[:2]), int.from_bytes(copy[2:HEAD])
        if exporter < EXPORTERS and copy == payload(exporter, number):
            self.came[exporter].append(number)
        else:
            self.wrong.append(copy)

    def check(self) -> None:
        """Every copy was a datagram that was sent, none came twice, and each exporter's came in order."""
        assert self.wrong == []
        for numbers in self.came:
            assert all(before < after for before, after in pairwise(numbers))


class Flood:
    """Exporters that send bursts, a round at a time, on the test's own thread."""

    def __init__(self, sources: list[socket.socket]) -> None:
        self._sources = sources
        self.rounds = 0

    def run(self, rounds: int, between: Callable[[int], object] = lambda _: None, seconds: float = 0.002) -> None:
        """Send so many rounds of one datagram each, a pause after every eighth; `between` is told of each."""
        for number in range(rounds):
            for exporter, sock in enumerate(self._sources):
                sock.send(payload(exporter, self.rounds))
            self.rounds += 1
            if self.rounds % 8 == 0:
                pause(seconds)
            between(number)

    @property
    def sent(self) -> int:
        """Datagrams so far."""
        return self.rounds * len(self._sources)


@pytest.fixture
def sink(lab: None) -> Iterator[Sink]:
    """The collector on 9100."""
    with closing(Sink(9100)) as collector:
        collector.start()
        yield collector


@pytest.fixture
def flood(lab: None) -> Iterator[Flood]:
    """The exporters, which send to 7000."""
    with exporters(EXPORTERS, 7000) as sources:
        yield Flood(sources)


def begin(stack: Stack, pool: int | None) -> None:
    """Start everything, and sign the sink up."""
    line = "" if pool is None else f"pool = {pool}\n"
    stream = '[[stream]]\nname = "s"\nlisten = ["udp://127.0.0.1:7000"]\nreceive_buffer = 268435456\n'
    stack.configure(f"{line}{stream}")
    stack.start_all()
    sign_up({"name": "c", "streams": ["s"], "port": 9100})


def settle(stack: Stack, sink: Sink, flood: Flood) -> tuple[Counter[str], Counter[str]]:
    """Wait until all that was sent is accounted for; return the stream's account and the collector's."""
    latest: dict[str, Accounts] = {}

    def found() -> tuple[Counter[str], Counter[str]]:
        stream = latest.get("ingest.1", {}).get("stream/s", {})
        return Counter(stream), Counter(latest.get("forwarder.1", {}).get("collector/c", {}))

    with BusEnds(stack.bus) as bus:
        subscriber, reports = bus.subscriber("status/"), Reports()

        def all_accounted_for() -> bool:
            while message := subscriber.receive():
                assert isinstance(message.body, Status)
                if report := reports.add(message.envelope, message.body):
                    assert list(discrepancies(report.accounts)) == []
                    latest[report.service] = report.accounts
            stream, collector = found()
            return (
                stream["received"] + stream["kernel_dropped"] == flood.sent
                and collector["expected"] == stream["published"]
                and sink.count + sink.lost == collector["sent"]
            )

        wait_until(
            all_accounted_for, lambda: f"sent {flood.sent}, came {sink.count}, lost {sink.lost}, accounts {found()}"
        )
    stream, collector = found()
    assert collector["sent"] + dropped(collector) + collector["missed"] == stream["published"]
    sink.check()
    return stream, collector


def given_back(ingest: Running) -> list[int]:
    """Return the numbers that each borrower has given back, read from the pages that ingest shares with them."""
    found = []
    for link in Path(f"/proc/{ingest.process.pid}/fd").iterdir():
        try:
            if "memfd:fanwire-page" in os.readlink(link):  # noqa: PTH115 - it is no path
                found.append(int.from_bytes(link.read_bytes()[:8], "little"))
        except FileNotFoundError:
            continue
    return found


def wait_lent(stack: Stack, flood: Flood, borrowers: int = 1) -> None:
    """Send until so many borrow and give back what they are lent."""
    before: list[int] = []

    def lent() -> bool:
        flood.run(16, seconds=0.01)
        now = given_back(stack["ingest.1"])
        before[:] = before or (now if len(now) == borrowers else [])
        return len(now) == borrowers and bool(before) and min(now) > max(before)

    wait_until(lent, f"payloads are lent to {borrowers}")


def reaches(sink: Sink, flood: Flood, number: int) -> bool:
    """Send a round, some of which may find no room in a buffer; return whether one from this number on has come."""
    flood.run(1)
    return bool(sink.came[0]) and sink.came[0][-1] >= number


@pytest.fixture
def stack(stack: Stack) -> Iterator[Stack]:
    """The stack, ended at once when a test is over."""
    yield stack
    kill_all(stack)


@pytest.mark.parametrize("pool", [4 << 20, None, 0, 1])
def test_all_arrive_intact(stack: Stack, sink: Sink, flood: Flood, pool: int | None) -> None:
    """Copies of bursts arrive intact, once and in order, lent from much or little memory or not at all."""
    begin(stack, pool)
    if pool is None or pool > 1:
        wait_lent(stack, flood)
    flood.run(600, seconds=0.02)
    stream, collector = settle(stack, sink, flood)
    assert bool(given_back(stack["ingest.1"])) == (pool is None or pool > 1)
    assert stream["published"] == flood.sent - stream["kernel_dropped"] == collector["sent"] == sink.count + sink.lost


@pytest.mark.parametrize("pool", [4 << 20, None])
def test_stopped_forwarder_sends_what_it_held(stack: Stack, sink: Sink, flood: Flood, pool: int | None) -> None:
    """A forwarder stopped in the middle again and again sends no byte of another datagram, and all is accounted for."""
    begin(stack, pool)
    wait_lent(stack, flood)
    forwarder = stack["forwarder"]

    def stop_and_go(number: int) -> None:
        if number % 100 == 40:
            freeze(forwarder)
        elif number % 100 == 90:
            forwarder.process.send_signal(signal.SIGCONT)

    flood.run(1000, stop_and_go)
    _, collector = settle(stack, sink, flood)
    assert collector["sent"] > 0
    wait_lent(stack, flood)
    settle(stack, sink, flood)


def test_stopped_reader_costs_the_collector_nothing(stack: Stack, sink: Sink, flood: Flood) -> None:
    """While `fanwire watch` stands still and holds all memory, copies go on by the bus, and it prints no wrong byte."""
    begin(stack, 4 << 20)
    watch = stack.operator("watch", "s", "--hex")
    watch.wait_for("watching s")
    wait_lent(stack, flood, 2)
    settle(stack, sink, flood)
    freeze(watch)
    flood.run(400, seconds=0.02)
    stream, collector = settle(stack, sink, flood)
    assert collector["sent"] == stream["published"]
    assert min(given_back(stack["ingest.1"])) < max(given_back(stack["ingest.1"]))
    watch.process.send_signal(signal.SIGCONT)
    last = payload(0, flood.rounds).hex()

    def goes_on() -> bool:
        flood.run(1)
        return last in watch.text or "missed" in watch.text

    wait_until(goes_on, "it goes on")
    watch.process.send_signal(signal.SIGINT)
    assert watch.process.wait(60) == 0
    printed = [line.rpartition(": ")[2] for line in watch.text.splitlines() if line.startswith("Got message")]
    assert len(printed) > 100
    for line in printed:
        copy = bytes.fromhex(line)
        assert copy == payload(int.from_bytes(copy[:2]), int.from_bytes(copy[2:HEAD]))
    wait_lent(stack, flood)


def test_killed_reader_gives_its_memory_back(stack: Stack, sink: Sink, flood: Flood) -> None:
    """A reader killed while it stands still and holds all memory is forgotten, and the forwarder is lent to again."""
    begin(stack, 4 << 20)
    watch = stack.operator("watch", "s", "--hex")
    watch.wait_for("watching s")
    wait_lent(stack, flood, 2)
    freeze(watch)
    flood.run(200, seconds=0.02)
    watch.process.kill()
    watch.process.wait()
    wait_lent(stack, flood, 1)
    stream, collector = settle(stack, sink, flood)
    assert collector["sent"] == stream["published"]


def test_killed_ingest_comes_back(stack: Stack, sink: Sink, flood: Flood) -> None:
    """Ingest killed in the middle of a flood leaves copies intact, and its successor lends again."""
    begin(stack, 4 << 20)
    wait_lent(stack, flood)
    flood.run(50)
    stack["ingest.1"].stop(signal.SIGKILL)
    wait_until(lambda: sink.quiet(0.5), "what was published has come")
    stack.start("ingest.1")
    count = sink.count
    wait_lent(stack, flood)
    flood.run(100)
    wait_until(partial(reaches, sink, flood, flood.rounds), "what is sent now comes")
    assert sink.count > count
    sink.check()


def test_killed_forwarder_comes_back(stack: Stack, sink: Sink, flood: Flood) -> None:
    """A forwarder killed in the middle of a flood gives back what it held, and its successor is lent to."""
    begin(stack, 4 << 20)
    wait_lent(stack, flood)
    for _ in range(3):
        flood.run(50)
        stack["forwarder"].stop(signal.SIGKILL)
        flood.run(50)
        stack.start("forwarder")
        wait_lent(stack, flood)
    flood.run(200, seconds=0.02)
    wait_until(partial(reaches, sink, flood, flood.rounds), "what is sent now comes")
    sink.check()
    assert len(given_back(stack["ingest.1"])) == 1


def test_pool_that_others_removed_is_lent_from_again(stack: Stack, sink: Sink, flood: Flood) -> None:
    """A subscriber that comes after another program has removed the pool is lent to; the collector misses nothing."""
    begin(stack, 4 << 20)
    wait_lent(stack, flood)
    (stack.bus / "pool.1").unlink()
    watch = stack.operator("watch", "s", "--hex")
    watch.wait_for("watching s")
    wait_lent(stack, flood, 2)
    stream, collector = settle(stack, sink, flood)
    assert collector["sent"] == stream["published"] == flood.sent - stream["kernel_dropped"]
