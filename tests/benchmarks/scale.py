"""Measures how fanwire's cost grows with the number of everything, one thing at a time, at a steady rate.

CPU µs a datagram of all processes together, and what one copy costs: exporters offer the same number of datagrams a
second whatever there is of the rest.
"""

import statistics
from dataclasses import dataclass
from typing import Final

from tests.benchmarks import ladder
from tests.benchmarks.backlog import settle
from tests.benchmarks.programs import Task, Way, running
from tests.benchmarks.site import Site
from tests.benchmarks.workloads import SYSLOG, Workload

BUFFER: Final = 1 << 25
SIZE: Final = 200
MTU: Final = 9000


@dataclass(frozen=True)
class Case:
    """The numbers of everything in one case.

    With `filters` each collector wants its own share of the exporters, else all get all.
    """

    collectors: int = 1
    exporters: int = 1000
    filters: bool = False
    streams: int = 1
    workers: int = 1
    size: int = SIZE

    @property
    def copies(self) -> int:
        """Copies a datagram."""
        return 1 if self.filters else self.collectors

    def __str__(self) -> str:
        wanted = "own shares" if self.filters else "all"
        return (
            f"{self.collectors:>5} collectors of {wanted:10} {self.exporters:>6} exporters {self.streams:>4} streams"
            f" {self.workers} workers {self.size:>5} bytes"
        )


RATE: Final = 50_000
"""Datagrams a second: what the least of machines can take with every case."""
CASES: Final = {
    "collectors": [Case(collectors=number) for number in (1, 4, 16)],
    "filters": [Case(collectors=number, filters=True) for number in (1, 10, 100, 1000)],
    "exporters": [Case(exporters=number) for number in (1, 10, 100, 1000, 10_000)],
    "streams": [Case(streams=number) for number in (1, 10, 100)],
    "workers": [Case(workers=number) for number in (1, 2, 4)],
    "size": [Case(size=number) for number in (64, 200, 1464, 8000)],
}


def measure(case: Case, way: Way, here: Site, rounds: int, rate: float = RATE) -> tuple[dict[str, float], float]:
    """CPU µs a datagram by process, median of the rounds, and the greatest share lost."""
    workload = Workload("scale", 20_000, case.exporters, 1, lambda _: case.size, SYSLOG, MTU, case.streams)
    task = Task("scale", case.collectors, way, BUFFER, case.exporters * case.filters, case.streams, case.workers)
    offer = here.offer(workload)
    with here.sinks(case.collectors) as sinks, running("fanwire", task, here) as program:
        program = settle(program, offer, sinks, case.exporters)
        ladder.count_and_stamp(sinks)
        found = [ladder.step(program, offer, sinks, rate, case.copies) for _ in range(rounds + 1)][1:]
    cpu = {name: statistics.median(rung.cpu_us[name] for rung in found) for name in found[0].cpu_us}
    return cpu, max(rung.lost for rung in found)
