"""The live path beside the journal: two collectors without it, with it, and while three others catch up.

The three ask for all that the journal has. In the end each must have got as many datagrams as were sent. Steady rates
are those of the paced method.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import Final

from tests.benchmarks.backlog import settle
from tests.benchmarks.paced import BUFFER, REST_SECONDS, Load, Measured, Reading
from tests.benchmarks.programs import Task, Way, running
from tests.benchmarks.site import Sink, Site, collector_address, collector_port, site
from tests.benchmarks.workloads import BY_NAME
from tests.stack import ask_json, wait_until

LIVE: Final = 2
AWAY: Final = 3
ALLOWED_CPU: Final = 1.05
"""CPU of the live path with the journal, beside that without, at most."""
ALLOWED_LATE: Final = 2.0
"""Lateness, p99, while others catch up, beside that before, at most."""
LEVEL_SECONDS: Final = 300.0
HELD_RATE, HELD_SECONDS = 60_000, 3.0
"""Loads a worker with as much as it holds for a journal, before each run: that memory is new only once."""
LIVE_PATH: Final = ("ingest.1", "broker", "forwarder", "transmitter")
SETTINGS: Final = '[gateway]\ndestinations = ["10.82.0.0/24"]\n'


@contextmanager
def _measured(task: Task, here: Site, tool: Path) -> Iterator[Measured]:
    with ExitStack() as opened:
        sinks = opened.enter_context(here.sinks(LIVE))
        program = opened.enter_context(running("journaled" if task.journal else "fanwire", task, here))
        program = settle(program, here.offer(replace(BY_NAME[task.workload], count=64)), sinks)
        found = opened.enter_context(closing(Measured(program, here, sinks, tool)))
        found.begin()
        found.run(Load(HELD_RATE, task.workload), HELD_SECONDS)
        yield found


def run(options: argparse.Namespace, tool: Path) -> list[str]:
    """Measure, and print a table; return a sentence for each bound that was not kept."""
    print("| workload | datagrams/s | way | | live path: CPU % | journal: CPU % | p50, p99 ms | copies lost |")
    print("|" + " --- |" * 8)
    beyond: list[str] = []
    for workload, rate, way in product(
        options.workload or ["small"], filter(None, options.rate), options.way or ["relay", "original"]
    ):
        task, load = Task(workload, LIVE, way, BUFFER, whole=True, settings=SETTINGS), Load(rate, workload)
        readings: list[dict[str, Reading]] = []
        missed = 0
        with site(BY_NAME[workload].mtu) as here:
            for _ in range(options.rounds):
                with _measured(task, here, tool) as program:
                    found = {"without": program.run(load, options.seconds)}
                with _measured(replace(task, journal=True), here, tool) as program:
                    since = time.time()
                    found["with"] = program.run(load, options.seconds)
                    with _caught_up(here, way, since) as sinks:
                        found["three catch up"] = program.run(load, options.seconds)
                    sent = sum(found[name].expected for name in ("with", "three catch up")) // LIVE
                    missed += sum(abs(sent - sink.count) for sink in sinks)
                readings.append(found)
        for name in readings[0]:
            print(_row(load, way, name, [each[name] for each in readings]), flush=True)
        beyond += [f"{workload}, {rate:,}/s, {way}: {sentence}" for sentence in _judge(readings, missed)]
    return beyond


@dataclass
class _Counted:
    """A collector that catches up, and how many datagrams have reached it."""

    sink: Sink
    count: int = 0


@contextmanager
def _caught_up(here: Site, way: Way, since: float) -> Iterator[list[_Counted]]:
    """Let three collectors catch up; at the end wait until they are level, and count what they have got."""
    with here.sinks(AWAY, first=LIVE) as sinks:
        counted = [_Counted(sink) for sink in sinks]
        for number, sink in enumerate(sinks, LIVE):
            sink.discard()
            answer = ask_json(
                {
                    "op": "register",
                    "name": f"away{number}",
                    "streams": ["*"],
                    "source": way,
                    "since": time.time() - since,
                }
                | {"address": collector_address(number), "port": collector_port(number)}
            )
            assert answer["ok"], answer
        yield counted
        behind = len(_behind())
        wait_until(lambda: not _behind(), "they are level", LEVEL_SECONDS)
        time.sleep(REST_SECONDS)
        print(f"{behind} of {AWAY} were still behind at the end", file=sys.stderr, flush=True)
        for each in counted:
            each.count = each.sink.dropped + len(each.sink.read())


def _behind() -> list[str]:
    """Return the names of those that catch up, as the gateway tells."""
    return [name for name, entry in ask_json({"op": "list"})["clients"].items() if "catching_up" in entry]


def _row(load: Load, way: Way, name: str, readings: list[Reading]) -> str:
    live, journal = _live_cpu(readings), median(each.cpu["journal"] for each in readings)
    p50, p99 = (median(each.late_us[quantile] for each in readings) / 1000 for quantile in ("p50", "p99"))
    lost = sum(each.expected - each.arrived for each in readings)
    cpu = f"{live:.1f} | {journal:.1f}"
    return f"| {load.workload} | {load.rate:,} | {way} | {name} | {cpu} | {p50:.1f}, {p99:.1f} | {lost} |"


def _live_cpu(readings: list[Reading]) -> float:
    return median(sum(cpu for name, cpu in each.cpu.items() if name in LIVE_PATH) for each in readings)


def _judge(readings: list[dict[str, Reading]], missed: int) -> Iterator[str]:
    cpu = {name: _live_cpu([each[name] for each in readings]) for name in readings[0]}
    late = {name: median(each[name].late_us["p99"] for each in readings) for name in readings[0]}
    lost = sum(each.expected - each.arrived for found in readings for each in found.values())
    if lost:
        yield f"{lost} copies of live collectors lost"
    if missed:
        yield f"{missed} datagrams too few or too many at those that caught up"
    if (times := cpu["with"] / cpu["without"]) > ALLOWED_CPU:
        yield f"with the journal the live path takes {times:.2f} times the CPU"
    if (times := late["three catch up"] / late["with"]) > ALLOWED_LATE:
        yield f"while others catch up p99 is {times:.1f} times as late"
