"""The ladder method: how many datagrams a second may come before more than 0.01 % are lost, and how late copies are.

A process of its own offers the workload at a steady rate, in small bursts; the rate is raised until copies go missing,
then halved in between. Everything shares this machine's cores, exporters included: on a small one these rates are lower
than the backlog's, for every program alike. Lateness is from the exporter's system call to the collector's socket, by
the kernel's own stamp, at a share of the rate found.
"""

import mmap
import multiprocessing
import socket
import struct
import time
from collections import Counter
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from tests.benchmarks.backlog import settle
from tests.benchmarks.programs import Program, Task, running
from tests.benchmarks.site import Offer, Sink, Site
from tests.benchmarks.workloads import MARK_SIZE, read_mark

LOSS: Final = 0.0001
SECONDS: Final = 1.5
STEP: Final = 1.25
HALVINGS: Final = 3
BURST: Final = 32
"""Datagrams a system call of the exporters takes at most: they have one stamp."""
PAUSE_SECONDS: Final = 0.0002
QUIET_SECONDS: Final = 0.25
SHARES: Final = (0.1, 0.5, 0.9)
QUANTILES: Final = {"p50": 50, "p99": 99, "p99.9": 99.9}
SO_TIMESTAMPNS: Final = 35
TIMESPEC: Final = struct.Struct("=qq")


@dataclass(frozen=True)
class Rung:
    """The results of one rate: datagrams/s offered in fact, share lost, CPU µs a datagram, and lateness in ns."""

    offered: float
    lost: float
    cpu_us: dict[str, float]
    late_ns: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Climb:
    """The highest rate without loss, and µs of lateness by share of it and quantile."""

    rate: float
    late_us: dict[str, dict[str, float]]
    resident_mb: float


def measure(name: str, task: Task, site: Site, offer: Offer, start: float) -> Climb:
    """Climb with a program from `start` datagrams/s."""
    with site.sinks(task.fan_out) as sinks, running(name, task, site) as program:
        program = settle(program, offer, sinks)
        count_and_stamp(sinks)
        step(program, offer, sinks, start / 4)  # warms it up
        best = _climb(program, offer, sinks, start)
        late = {}
        for share in SHARES:
            rung = step(program, offer, sinks, best * share)
            late[f"{share:.0%}"] = {
                quantile: float(np.percentile(rung.late_ns, at)) / 1000 for quantile, at in QUANTILES.items()
            }
        return Climb(best, late, program.resident_mb())


def count_and_stamp(sinks: list[Sink]) -> None:
    """Let collectors count what comes and note the times of the probes."""
    for sink in sinks:
        sink.discard()
        sink.socket.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)


def _climb(program: Program, offer: Offer, sinks: list[Sink], rate: float) -> float:
    best, worst = 0.0, 0.0
    while not worst:
        rung = step(program, offer, sinks, rate)
        if rung.lost > LOSS:
            worst = rate
        elif rung.offered < 0.95 * rate:
            return rung.offered  # the exporters are what is slow
        else:
            best, rate = rung.offered, rate * STEP
    best = best or worst / STEP**4
    for _ in range(HALVINGS):
        middle = (best + worst) / 2
        rung = step(program, offer, sinks, middle)
        best, worst = (best, middle) if rung.lost > LOSS else (middle, worst)
    return best


def step(program: Program, offer: Offer, sinks: list[Sink], rate: float, copies: int = 0) -> Rung:
    """Offer so many datagrams a second for a while. Of each there should be a copy a sink, or so many in all."""
    total = max(offer.count // 8, int(rate * SECONDS))
    stamps = np.frombuffer(
        mmap.mmap(-1, 8 * (total + 1)), np.int64
    )  # shared with the child; the last: how long it took
    for sink in sinks:
        sink.read()
    dropped = [sink.dropped for sink in sinks]
    before = program.cpu_ns()
    exporters = multiprocessing.get_context("fork").Process(target=_export, args=(offer, rate, total, stamps))
    exporters.start()
    exporters.join()
    assert exporters.exitcode == 0
    seen, changed_at = -1, time.perf_counter()
    while time.perf_counter() - changed_at < QUIET_SECONDS:
        now = sum(sink.moved for sink in sinks)
        if now != seen:
            seen, changed_at = now, time.perf_counter()
        time.sleep(0.01)
    spent = {name: (ns - before[name]) / 1000 / total for name, ns in program.cpu_ns().items()}
    arrived, late = 0, np.empty(0, np.int64)
    for sink, at in zip(sinks, dropped, strict=True):
        probes = _read_probes(sink)
        arrived += sink.dropped - at + len(probes)
        late = np.append(late, _lateness(offer, probes, stamps))
    return Rung(total / (stamps[-1] / 1e9), 1 - arrived / total / (copies or len(sinks)), spent, late)


def _export(offer: Offer, rate: float, total: int, stamps: npt.NDArray[np.int64]) -> None:
    began, sent = time.perf_counter(), 0
    while sent < total:
        due = min(total, int((time.perf_counter() - began) * rate) + 1)
        while sent < due:
            start = sent % offer.count
            burst = min(due - sent, BURST, offer.count - start)
            stamps[sent : sent + burst] = time.time_ns()
            offer.send(start, start + burst)
            sent += burst
        time.sleep(PAUSE_SECONDS)
    stamps[-1] = int((time.perf_counter() - began) * 1e9)


def _read_probes(sink: Sink) -> list[tuple[int, int]]:
    """The number of each probe that came, and when."""
    probes: list[tuple[int, int]] = []
    while True:
        try:
            payload, control, _, _ = sink.socket.recvmsg(65536, 64)
        except BlockingIOError:
            return probes
        seconds, ns = next(
            TIMESPEC.unpack(data)
            for level, kind, data in control
            if (level, kind) == (socket.SOL_SOCKET, SO_TIMESTAMPNS)
        )
        probes.append((read_mark(payload[-MARK_SIZE:])[1], seconds * 10**9 + ns))


def _lateness(offer: Offer, probes: list[tuple[int, int]], stamps: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the lateness of each probe.

    The workload repeats itself: a number's first copy is of the first time it was sent.
    """
    times: Counter[int] = Counter()
    late = []
    for number, arrived in probes:
        sent = number + offer.count * times[number]
        times[number] += 1
        if sent < len(stamps) - 1:  # else a relay sent a copy twice, as pmacct's do when they are overrun
            late.append(arrived - int(stamps[sent]))
    return np.array(late, np.int64)
