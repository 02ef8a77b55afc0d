"""The backlog method: how fast a relay empties its socket's buffer.

The relay is stopped, its receive buffer is filled, the relay goes on, and the draining is timed until the last copy has
reached its collector. Exporters cost nothing meanwhile, and collectors are sockets that the kernel empties by itself:
what is measured is the relay alone, which is steady on small and noisy machines. A first round, not timed, reads every
copy: none lost, order kept.
"""

import signal
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.benchmarks.programs import Program, Task, running
from tests.benchmarks.site import Offer, Sink, Site
from tests.benchmarks.workloads import read_mark
from tests.stack import wait_until

QUIET_SECONDS: Final = 0.3
"""On a busy machine a program may stand still for a while."""


@dataclass(frozen=True)
class Round:
    """The results of one round: datagrams/s to each collector, CPU µs a datagram received, copies lost, MB resident.

    `in_order`: whether each exporter's copies came in order and once, when all of them were read.
    """

    rate: float
    cpu_us: dict[str, float]
    lost: int
    resident_mb: float
    in_order: bool


def measure(name: str, task: Task, site: Site, offer: Offer, rounds: int) -> list[Round]:
    """Check a program once, warm it up once, then measure it `rounds` times. fanwire must lose nothing."""
    whole = len(offer.workload.payloads()[0]) if offer.workload.whole else 0
    with site.sinks(task.fan_out, whole) as sinks, running(name, task, site) as program:
        program = settle(program, offer, sinks)
        in_order = check(program, offer, sinks)
        for sink in sinks if not whole else ():  # a filter would count pieces, not datagrams
            sink.discard()
        found = [measure_once(program, offer, sinks, in_order=in_order) for _ in range(rounds + 1)][1:]
    lost = sum(each.lost for each in found)
    assert name != "fanwire" or (in_order and not lost), f"{task}: fanwire lost {lost}, order kept: {in_order}"
    return found


def settle(program: Program, offer: Offer, sinks: list[Sink], count: int = 1) -> Program:
    """Send the first datagrams until every collector gets its copies; return the program with all its processes."""

    def arrived() -> bool:
        offer.send(0, count)
        time.sleep(0.05)
        return all(sink.moved for sink in sinks)

    wait_until(arrived, f"{program.name} relays")
    time.sleep(0.3)
    for sink in sinks:
        sink.read()
    if len(program.processes) > 1:
        return program
    (pid,) = program.processes.values()
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return Program(program.name, program.processes | {f"child {n + 1}": int(text) for n, text in enumerate(children)})


def drain(program: Program, offer: Offer, sinks: list[Sink]) -> float:
    """Fill the relay's buffer while it is stopped; return the seconds that it takes to empty it."""
    program.signal(signal.SIGSTOP)
    offer.send_all()
    began = time.perf_counter()
    program.signal(signal.SIGCONT)
    seen, changed_at = -1, began
    while time.perf_counter() - changed_at < QUIET_SECONDS:
        now = sum(sink.moved for sink in sinks)
        if now != seen:
            seen, changed_at = now, time.perf_counter()
        time.sleep(0.0005)
    return changed_at - began


def check(program: Program, offer: Offer, sinks: list[Sink]) -> bool:
    """A round in which every copy is read; return whether each exporter's came in order, and none twice."""
    drain(program, offer, sinks)
    in_order = True
    for sink in sinks:
        after: Counter[int] = Counter()
        for exporter, number in map(read_mark, sink.read()):
            in_order = in_order and number >= after[exporter]
            after[exporter] = number + 1
    return in_order


def measure_once(program: Program, offer: Offer, sinks: list[Sink], *, in_order: bool) -> Round:
    """One timed round."""
    for sink in sinks:
        sink.read()
    dropped = [sink.dropped for sink in sinks]
    before = program.cpu_ns()
    seconds = drain(program, offer, sinks)
    spent = {name: ns - before[name] for name, ns in program.cpu_ns().items()}
    probes = [len(sink.read()) for sink in sinks]
    counts = [sink.dropped - at + read for sink, at, read in zip(sinks, dropped, probes, strict=True)]
    # Not every relay takes a buffer that holds the whole workload: it is measured by what it did take.
    relayed = max(1, *counts)
    cpu = {name: ns / 1000 / relayed for name, ns in spent.items()}
    lost = offer.count * len(sinks) - sum(counts)
    return Round(relayed / seconds, cpu, lost, program.resident_mb(), in_order)
