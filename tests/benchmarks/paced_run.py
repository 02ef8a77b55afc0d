"""Runs the paced method for all that the options ask for: programs in turn, round by round."""

import argparse
import sys
from functools import partial
from itertools import product
from pathlib import Path
from typing import Final

from tests.benchmarks import bare, beside_journal, kernel_copies, kernel_path, paced, paced_record, paced_report
from tests.benchmarks.paced import BUFFER, SPACINGS, Load, Measured, Reading
from tests.benchmarks.paced_report import Cell
from tests.benchmarks.programs import Task, available
from tests.benchmarks.site import Site, site
from tests.benchmarks.workloads import BY_NAME
from tests.lab import enter_lab

RATES: Final = (0, 100, 1_000, 10_000, 50_000, 100_000)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of this method alone."""
    group = parser.add_argument_group(
        "with --paced; beside --fan-out (1 4), --way (relay), --workload (small), --peers"
    )
    group.add_argument("--rate", type=int, nargs="*", default=list(RATES), help="datagrams a second; 0: idle")
    group.add_argument("--sources", type=int, nargs="*", default=[16], help="number of exporters, such as 1 16 500")
    group.add_argument("--spacing", nargs="*", choices=SPACINGS, default=["even"])
    group.add_argument("--seconds", type=float, default=3.0, help="how long each rate is measured, in each round")
    group.add_argument("--no-nft", dest="nft", action="store_false", help="leave out the kernel's own copying")
    group.add_argument("--settings", default="", help="more settings for fanwire, as in a settings file")
    group.add_argument(
        "--kernel", action="store_true", help="measure offload beside samplicator instead, with the kernel's CPU"
    )
    group.add_argument(
        "--journal", action="store_true", help="measure the live path beside the journal, and while others catch up"
    )
    group.add_argument("--markdown", action="store_true", help="also print a table to paste")
    group.add_argument(
        "--record", action="store_true", help="keep the run as what later ones are checked against, and in the READMEs"
    )


def run(options: argparse.Namespace) -> int:
    """Measure, print, save; return the exit code. To be called with large buffers allowed."""
    if options.check and not paced_record.JSON.exists():
        sys.exit(f"nothing to compare with: make {paced_record.JSON.name} by --paced --record first")
    cells: list[Cell] = []
    with bare.compiled(paced.SOURCE) as tool:
        if tool is None:
            sys.exit("needs a C compiler: on Debian, apt-get install gcc libc6-dev")
        if refused := enter_lab():
            sys.exit(f"needs a network namespace of its own, and {refused}")
        if options.kernel or options.journal:
            beyond = (kernel_path if options.kernel else beside_journal).run(options, tool)
            print("".join(f"beyond: {sentence}\n" for sentence in beyond))
            return int(bool(beyond))
        for workload, fan_out, way in product(
            options.workload or ["small"], options.fan_out or [1, 4], options.way or ["relay"]
        ):
            with site(BY_NAME[workload].mtu) as here:
                cells += run_group(
                    Task(workload, fan_out, way, BUFFER, whole=True, settings=options.settings), here, tool, options
                )
    if options.markdown:
        print(f"\n{paced_report.table(cells)}")
    if options.json:
        paced_report.write(options.json, "python -m tests.benchmarks " + " ".join(sys.argv[1:]), cells)
    if options.record:
        paced_record.keep("python -m tests.benchmarks " + " ".join(sys.argv[1:]), cells)
    found = paced_report.worse(paced_report.read(paced_record.JSON), cells) if options.check else []
    for sentence in found:
        print(f"worse: {sentence}")
    return int(bool(found))


def run_group(task: Task, here: Site, tool: Path, options: argparse.Namespace) -> list[Cell]:
    """All loads at one fan-out and way: each round starts every program once."""
    names = list(available(task, ["fanwire", *options.peers]))
    names += [kernel_copies.NAME] if kernel_copies.available(task) and options.nft else []
    found: dict[tuple[Load, str], list[Reading]] = {}
    for _ in range(options.rounds):
        for name in names:
            begin = kernel_copies.copying if name == kernel_copies.NAME else partial(paced.measured, name)
            with begin(task, here, tool) as program:
                for load in paced.loads(options, task.workload):
                    found.setdefault((load, name), []).append(measure(program, load, options.seconds))
    cells = []
    for load in paced.loads(options, task.workload):
        for name in [name for each, name in found if each == load]:
            cells.append(paced_report.summarize(name, task.way, task.fan_out, load, found[load, name]))
            print(cells[-1].line(), flush=True)
    return cells


def measure(program: Measured, load: Load, seconds: float) -> Reading:
    """One program with one load."""
    return program.run(load, seconds) if load.rate else program.idle(seconds)
