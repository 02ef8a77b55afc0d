"""The kernel's own path: fanwire with offload beside samplicator, with all CPU that a datagram takes, the kernel's too.

Between hosts on one machine the kernel does all of its work for a datagram on the sender's time, but for what it leaves
to ksoftirqd. So the CPU of a program is that of its processes, the exporters and ksoftirqd together, beyond what the
latter two take where the interface drops all that comes. Steady rates are those of the paced method.
"""

import argparse
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Final

from tests.benchmarks.backlog import settle
from tests.benchmarks.kernel_copies import ETHTOOL_STXCSUM, put_rule
from tests.benchmarks.paced import BUFFER, Load, Measured, Reading
from tests.benchmarks.programs import Program, Task, running
from tests.benchmarks.site import Site, site
from tests.benchmarks.workloads import BY_NAME
from tests.stack import wait_until

RATES: Final = (1_000, 10_000, 50_000)
PROGRAMS: Final = ("unseen", "offload", "samplicate")
"""`unseen` is offload too, where ingest does not see what the kernel has copied for all."""
SETTINGS: Final = {
    "offload": '[offload]\ninterfaces = ["in"]\n',
    "unseen": '[offload]\ninterfaces = ["in"]\nunseen = ["bench0"]\n',
}
ALLOWED: Final = 0.3
"""CPU beside samplicator's, at most."""
ALLOWED_MS: Final = 0.2
"""Lateness, p99."""


class WholeMachine(Measured):
    """A program, of which everything counts that anything here does for a datagram."""

    def _watched(self, sender: subprocess.Popen[bytes]) -> Program:
        return Program(self.program.name, self.program.processes | _kernel_threads() | {"exporters": sender.pid})


def _kernel_threads() -> dict[str, int]:
    """Return the threads of the kernel that do what interrupts leave over, where they are to be seen."""
    names = {path.parent.name: path.read_text().strip() for path in Path("/proc").glob("[0-9]*/comm")}
    return {name: int(pid) for pid, name in names.items() if name.startswith("ksoftirqd/")}


@contextmanager
def _measured(name: str, task: Task, here: Site, tool: Path) -> Iterator[WholeMachine]:
    """A program at work; `drop`: none, and a rule that drops everything."""
    with ExitStack() as opened:
        sinks = opened.enter_context(here.sinks(task.fan_out))
        here.exporters_end.ethtool(ETHTOOL_STXCSUM, 0)  # complete checksums, as they come by a wire
        if name == "drop":
            put_rule(here, "drop")
            opened.callback(here.relay.run, "nft", "flush", "ruleset")
            program = Program(name, {})
        else:
            program = opened.enter_context(running(name, task, here))
            program = settle(program, here.offer(replace(BY_NAME[task.workload], count=64)), sinks)
        if name in SETTINGS:
            wait_until(lambda: _served(here) == task.fan_out, "the kernel serves all")
        found = opened.enter_context(closing(WholeMachine(program, here, sinks, tool)))
        found.begin()
        yield found


def _served(here: Site) -> int:
    """Return the number of collectors that offload's rules copy to."""
    return here.relay.run("nft", "list", "ruleset").count(" dup to ")


def run(options: argparse.Namespace, tool: Path) -> list[str]:
    """Measure, and print a table; return a sentence for each bound that was not kept."""
    heads = " | ".join(f"{name}: CPU % | p50, p99 ms" for name in PROGRAMS)
    print(f"| datagrams/s | way | collectors | {heads} | unseen beside samplicate |")
    print("|" + " --- |" * (4 + 2 * len(PROGRAMS)))
    beyond: list[str] = []
    for fan_out, way in product(options.fan_out or [1, 4], options.way or ["relay", "original"]):
        found: dict[tuple[str, int], list[Reading]] = {}
        with site(BY_NAME["small"].mtu) as here:
            for _, name in product(range(options.rounds), ("drop", *PROGRAMS)):
                task = Task("small", fan_out, way, BUFFER, whole=True, settings=SETTINGS.get(name, ""))
                with _measured(name, task, here, tool) as program:
                    for rate in options.rate:
                        found.setdefault((name, rate), []).append(program.run(Load(rate), options.seconds))
        for rate in options.rate:
            least = _cpu(found["drop", rate])
            cpu = {name: _cpu(found[name, rate]) - least for name in PROGRAMS}
            late = {name: _late_ms(found[name, rate]) for name in PROGRAMS}
            ratio = cpu["unseen"] / cpu["samplicate"]
            cells = " | ".join(f"{cpu[name]:.2f} | {late[name][0]:.2f}, {late[name][1]:.2f}" for name in PROGRAMS)
            print(f"| {rate:,} | {way} | {fan_out} | {cells} | {ratio:.2f} |", flush=True)
            parts = found["unseen", rate][-1].cpu.items()
            print("unseen:", " + ".join(f"{name} {cpu:.2f}" for name, cpu in parts), file=sys.stderr, flush=True)
            lost = sum(each.expected - each.arrived for name in SETTINGS for each in found[name, rate])
            where = f"{rate:,}/s, {way}, {fan_out} collectors"
            beyond += [f"{where}: {lost} copies lost"] * bool(lost)
            beyond += [f"{where}: CPU {ratio:.2f} times samplicator's"] * (ratio > ALLOWED)
            beyond += [f"{where}: p99 {late['unseen'][1]:.2f} ms"] * (late["unseen"][1] > ALLOWED_MS)
    return beyond


def _cpu(readings: list[Reading]) -> float:
    return statistics.median(sum(each.cpu.values()) for each in readings)


def _late_ms(readings: list[Reading]) -> tuple[float, float]:
    p50, p99 = (statistics.median(each.late_us[name] for each in readings) / 1000 for name in ("p50", "p99"))
    return p50, p99
