"""The kernel's own path: fanwire with offload beside samplicator, with all CPU that a datagram takes, the kernel's too.

Between hosts on one machine the kernel does all of its work for a datagram on the sender's time, but for what it leaves
to ksoftirqd. So the CPU of a program is that of its processes, the exporters and ksoftirqd together, beyond what the
latter two take where the interface drops all that comes. Steady rates are those of the paced method.
"""

import argparse
import statistics
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Final

from tests.benchmarks import kernel_copies, paced
from tests.benchmarks.backlog import settle
from tests.benchmarks.kernel_copies import ETHTOOL_STXCSUM, copies, put_rule
from tests.benchmarks.paced import BUFFER, TRAINS, Load, Measured, Reading
from tests.benchmarks.programs import Program, Task, running
from tests.benchmarks.site import Site, site
from tests.benchmarks.workloads import BY_NAME
from tests.stack import wait_until

PROGRAMS: Final = ("unseen", "offload", "samplicate")
"""`unseen` is offload too, where ingest does not see what the kernel has copied for all."""
SETTINGS: Final = {
    "offload": '[offload]\ninterfaces = ["in"]\n',
    "unseen": '[offload]\ninterfaces = ["in"]\nunseen = ["bench0"]\n',
}
ALLOWED: Final = {"samplicate": 0.3, kernel_copies.NAME: 1.2}
"""CPU of `unseen` beside that of others, at most."""
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
def _measured(name: str, task: Task, here: Site, tool: Path, whole: int) -> Iterator[WholeMachine]:
    """A program at work, or rules: `drop` of everything, `nft` that copies. Collectors take trains of `whole` bytes."""
    with ExitStack() as opened:
        sinks = opened.enter_context(here.sinks(task.fan_out, whole))
        # complete checksums, as they come by a wire; those of a train are left to the card
        here.exporters_end.ethtool(ETHTOOL_STXCSUM, int(bool(whole)))
        if name in ("drop", kernel_copies.NAME):
            put_rule(here, "drop" if name == "drop" else copies(here, task.fan_out))
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
    ruleset = here.relay.run("nft", "list", "ruleset")
    return ruleset.count(" dup to ") + ruleset.count(" fwd to ")


def run(options: argparse.Namespace, tool: Path) -> list[str]:
    """Measure, and print a table; return a sentence for each bound that was not kept."""
    beyond: list[str] = []
    for spacing, workload, fan_out, way in product(
        options.spacing, options.workload or ["small"], options.fan_out or [1, 4], options.way or ["relay", "original"]
    ):
        task = Task(workload, fan_out, way, BUFFER, whole=True)
        whole = len(BY_NAME[workload].payloads()[0]) if spacing == TRAINS else 0
        names = [name for name in PROGRAMS if name != "samplicate" or not whole]  # its copies are no trains
        names += [kernel_copies.NAME] * kernel_copies.available(task)
        loads = [each for each in paced.loads(options, workload) if each.rate and each.spacing == spacing]
        found: dict[tuple[str, Load], list[Reading]] = {}
        with site(BY_NAME[workload].mtu) as here:
            for _, name in product(range(options.rounds), ("drop", *names)):
                with _measured(name, replace(task, settings=SETTINGS.get(name, "")), here, tool, whole) as program:
                    for load in loads:
                        found.setdefault((name, load), []).append(program.run(load, options.seconds))
        for load in loads:
            row = {name: found[name, load] for name in ("drop", *names)}
            beyond += _tell(f"{load.rate:,}/s {workload} {spacing}, {way}, {fan_out} collectors", row)
    return beyond


def _tell(where: str, row: dict[str, list[Reading]]) -> list[str]:
    """Print the figures of one load; return a sentence for each bound that was not kept."""
    least = _cpu(row.pop("drop"))
    cpu = {name: _cpu(readings) - least for name, readings in row.items()}
    print(f"{where} (dropping it: {least:.2f} %)")
    for name, readings in row.items():
        p50, p99 = _late_ms(readings)
        lost = sum(each.expected - each.arrived for each in readings)
        offered = statistics.median(each.offered for each in readings)
        print(
            f"  {name:10} CPU {cpu[name]:7.2f} %  p50 {p50:.2f} p99 {p99:.2f} ms  offered {offered:,.0f}/s  lost {lost}"
        )
    parts = row["unseen"][-1].cpu.items()
    print("  unseen:", " + ".join(f"{name} {cpu:.2f}" for name, cpu in parts), flush=True)
    lost = sum(each.expected - each.arrived for name in SETTINGS for each in row[name])
    late = _late_ms(row["unseen"])[1]
    beyond = [f"{where}: {lost} copies lost"] * bool(lost)
    for name, allowed in ALLOWED.items():
        if name in cpu:
            ratio = cpu["unseen"] / cpu[name]
            print(f"  unseen takes {ratio:.2f} times the CPU of {name}", flush=True)
            beyond += [f"{where}: CPU {ratio:.2f} times that of {name}"] * (ratio > allowed)
    return beyond + [f"{where}: p99 {late:.2f} ms"] * (late > ALLOWED_MS)


def _cpu(readings: list[Reading]) -> float:
    return statistics.median(sum(each.cpu.values()) for each in readings)


def _late_ms(readings: list[Reading]) -> tuple[float, float]:
    p50, p99 = (statistics.median(each.late_us[name] for each in readings) / 1000 for name in ("p50", "p99"))
    return p50, p99
