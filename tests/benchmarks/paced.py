"""The paced method: what a steady rate costs, as a site's exporters send it, and how late its copies are.

Exporters and collectors are two C programs (`paced.c`) that sleep between datagrams, so that they take little of the
cores that they share with the relay. Each exporter is a UDP socket with an address of its own. It sends its datagrams
`even`ly spaced, one by one in turn with the others; in `bursts` of 20 to 30, as a router flushes its flow cache; or in
`trains` of 16, which leave as one send with UDP_SEGMENT. Payloads carry the clock just before the send call; lateness
is from there to just after the collector's receive call. Collectors are woken by at most some thousand datagrams a
second, drawn at random; a filter on their sockets counts the others. The loss is what the exporters sent and the
collectors have not counted; the receive buffer is fanwire's default for every program.

CPU is that of all threads of all processes of a program, of fanwire everything that `make run` starts, in per cent of
one core: idle services count. What the kernel does by itself before a datagram lies in the relay's receive buffer
counts for no program, since it happens on the sender's time. `nft` is the kernel copying by itself, by a netdev rule
with `dup to`: its cost is what the sending takes longer than with a rule that drops. Programs take turns, round by
round, on one machine; figures are medians of the rounds, the loss is that of all of them.
"""

import argparse
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from shared.net.sockets import enlarge_send_buffer
from tests.benchmarks.backlog import settle
from tests.benchmarks.programs import Program, Task, running
from tests.benchmarks.site import PORT, RELAY, Sink, Site
from tests.benchmarks.workloads import BY_NAME, Workload, exporter_address
from tests.stack import wait_until

SOURCE: Final = Path(__file__).with_name("paced.c")
BUFFER: Final = 1 << 25
"""Bytes: fanwire's own default."""
WARM_SECONDS: Final = 0.7
IDLE_SECONDS: Final = 4.0
"""The work of an idle service comes once or twice a second."""
MARGIN_SECONDS: Final = 0.1
"""Time for which the sender goes on after what is measured."""
QUIET_SECONDS: Final = 1.5
"""After which what has not come is lost."""
REST_SECONDS: Final = 0.3
"""Pause after which the last copies have come, also on a busy machine."""
PROBES: Final = 4000
"""Datagrams a second, of all collectors together, whose lateness is looked at."""
TRAINS: Final = "trains"
SPACINGS: Final = {"even": (1, 1, 0), "bursts": (20, 30, 0), TRAINS: (16, 16, 1)}
"""Fewest and most datagrams that one exporter sends at once, and whether by one UDP_SEGMENT send."""
RECORD: Final = np.dtype(
    [("stamp", "u8"), ("received", "u8"), ("collector", "u4"), ("exporter", "u4"), ("number", "u4"), ("_", "u4")]
)
QUANTILES: Final = {"p50": 50, "p99": 99, "p99.9": 99.9}
IP_TRANSPARENT: Final = 19
"""Lets a socket have an address that is not this host's (ip(7))."""


@dataclass(frozen=True)
class Load:
    """The load of exporters: sizes as in a workload, a rate of datagrams, a number of sources, and their spacing."""

    rate: int
    workload: str = "small"
    sources: int = 16
    spacing: str = "even"


def loads(options: argparse.Namespace, workload: str) -> Iterator[Load]:
    """Yield the loads in turn; idleness has no sources and no spacing, and trains no different sizes."""
    if 0 in options.rate:
        yield Load(0, workload, options.sources[0], options.spacing[0])
    for sources, spacing, rate in product(options.sources, options.spacing, filter(None, options.rate)):
        if spacing != TRAINS or workload != "syslog":
            yield Load(rate, workload, sources, spacing)


@dataclass(frozen=True)
class Reading:
    """The results of one run: per cent of a core a process, wake-ups a second, µs of lateness by quantile, counts."""

    cpu: dict[str, float]
    wakeups: float
    late_us: dict[str, float]
    offered: float
    expected: int
    arrived: int
    in_order: bool


@dataclass
class Measured:
    """A program at work, and what it takes to load and to time it."""

    program: Program
    site: Site
    sinks: list[Sink]
    tool: Path
    """The C program; files that it reads are put beside it."""
    _exporters: list[socket.socket] = field(default_factory=list)

    def begin(self) -> None:
        """Let the collectors count, and see only probes, from now on."""
        for sink in self.sinks:
            sink.discard()
        wait_until(lambda: not any(sink.read() for sink in self.sinks), "collectors are empty")

    def idle(self, seconds: float) -> Reading:
        """Measure the cost of the program with nothing to do."""
        time.sleep(WARM_SECONDS)
        cpu, wakeups = _spent(self.program, max(seconds, IDLE_SECONDS))
        return Reading(cpu, wakeups, {}, 0, 0, 0, True)

    def run(self, load: Load, seconds: float) -> Reading:
        """Send at a rate; return what it cost and how late it was after a moment of warming up."""
        dropped = [sink.dropped for sink in self.sinks]
        receiver = self._start(["receive"], [sink.socket for sink in self.sinks])
        assert receiver.stdout is not None
        assert receiver.stdout.readline() == b"ready\n"
        try:
            with self._sending(load, WARM_SECONDS + seconds + MARGIN_SECONDS) as sender:
                time.sleep(WARM_SECONDS)
                begin = time.monotonic_ns()
                cpu, wakeups = _spent(self._watched(sender), seconds)
                end = time.monotonic_ns()
                sent, refused, probes, took_ns = map(int, sender.communicate()[0].split())
            assert not sender.returncode, "the exporters failed"
            self._wait_until_quiet((sent + refused - probes) * len(self.sinks) + sum(dropped))
        finally:
            receiver.terminate()
            records = np.frombuffer(receiver.communicate()[0], RECORD)
        assert not receiver.returncode, "the collectors failed"
        arrived = len(records) + sum(sink.dropped - at for sink, at in zip(self.sinks, dropped, strict=True))
        if self.sinks[0].whole:
            arrived *= SPACINGS[load.spacing][0]  # a train comes, or is dropped, as one
        timed = records[(records["stamp"] >= begin) & (records["stamp"] < end)]
        late = (timed["received"] - timed["stamp"]).astype(np.int64) / 1000
        quantiles = {name: float(np.percentile(late, at)) if len(late) else np.inf for name, at in QUANTILES.items()}
        offered = (sent + refused) / (took_ns / 1e9)
        return Reading(cpu, wakeups, quantiles, offered, sent * len(self.sinks), arrived, in_order(records))

    def _watched(self, _sender: subprocess.Popen[bytes]) -> Program:
        """The processes whose CPU counts."""
        return self.program

    @contextmanager
    def _sending(self, load: Load, seconds: float) -> Iterator[subprocess.Popen[bytes]]:
        workload = BY_NAME[load.workload]
        lengths = self.tool.parent / "lengths"
        lengths.write_bytes(np.array([len(each) for each in workload.payloads()[:65536]], np.uint16).tobytes())
        fewest, most, trains = SPACINGS[load.spacing]
        words = [load.rate, seconds, fewest, most, trains, PROBES / len(self.sinks), lengths]
        sender = self._start(["send", *map(str, words)], self._sockets(load.sources))
        try:
            yield sender
        finally:
            sender.kill()
            sender.wait()

    def _start(self, words: list[str], sockets: list[socket.socket]) -> subprocess.Popen[bytes]:
        numbers = [sock.fileno() for sock in sockets]
        listed = self.tool.parent / f"{words[0]}.sockets"
        listed.write_bytes(struct.pack(f"={len(numbers)}i", *numbers))
        with listed.open("rb") as stdin:
            return subprocess.Popen([self.tool, *words], stdin=stdin, stdout=subprocess.PIPE, pass_fds=numbers)

    def _sockets(self, count: int) -> list[socket.socket]:
        """A connected socket an exporter."""
        if len(self._exporters) != count:
            self.close()
            self._exporters = [exporter_socket(self.site, number) for number in range(count)]
        return self._exporters

    def _wait_until_quiet(self, expected: int) -> None:
        """Wait until so many datagrams that are no probes have come, or nothing more comes."""
        seen, changed_at = -1, time.perf_counter()
        while seen < expected and time.perf_counter() - changed_at < QUIET_SECONDS:
            now = sum(sink.dropped for sink in self.sinks)
            if now != seen:
                seen, changed_at = now, time.perf_counter()
            time.sleep(REST_SECONDS)
        time.sleep(REST_SECONDS)

    def close(self) -> None:
        """Close the exporters' sockets."""
        for sock in self._exporters:
            sock.close()
        self._exporters = []


def _spent(program: Program, seconds: float) -> tuple[dict[str, float], float]:
    """Per cent of a core by process, and wake-ups a second, from now on for a while."""
    began, cpu, waits = time.perf_counter(), program.cpu_ns(), program.wakeups()
    time.sleep(seconds)
    after, after_waits, took = program.cpu_ns(), program.wakeups(), time.perf_counter() - began
    return {name: (after[name] - ns) / 1e7 / took for name, ns in cpu.items()}, (after_waits - waits) / took


def exporter_socket(site: Site, number: int) -> socket.socket:
    """A socket that sends to the relay from an exporter's own address."""
    sock = site.exporters.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setsockopt(socket.IPPROTO_IP, IP_TRANSPARENT, 1)
    enlarge_send_buffer(sock, 1 << 22)
    sock.bind((str(exporter_address(number)), 20_000 + number))
    sock.connect((RELAY, PORT))
    return sock


def in_order(records: npt.NDArray[np.void]) -> bool:
    """Return whether each collector got what it saw of each exporter in order, and once."""
    after: dict[tuple[int, int], int] = {}
    for collector, exporter, number in records[["collector", "exporter", "number"]].tolist():
        if number < after.get((collector, exporter), 0):
            return False
        after[collector, exporter] = number + 1
    return True


@contextmanager
def measured(name: str, task: Task, site: Site, tool: Path) -> Iterator[Measured]:
    """A program that relays to so many collectors, ready to be measured."""
    workload: Workload = replace(BY_NAME[task.workload], count=64)
    with ExitStack() as opened:
        sinks = opened.enter_context(site.sinks(task.fan_out))
        program = opened.enter_context(running(name, task, site))
        program = settle(program, site.offer(workload), sinks)
        here = opened.enter_context(closing(Measured(program, site, sinks, tool)))
        here.begin()
        yield here
