"""fanwire side by side with the relays found on PATH, in network namespaces of its own. Run by `make bench`, as root.

Rates and CPU by the backlog method, how close each stage is to a bare loop in C, with `--ladder` the highest rates
without loss and how late copies are, and with `--scale` how the cost grows. With `--paced` instead what steady rates
cost, as sites have them, and how late copies are then.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Final

from tests.benchmarks import backlog, bare, ladder, paced_run, scale
from tests.benchmarks.programs import PEERS, WAYS, Task, Way, available
from tests.benchmarks.report import Results, plot, slower, summarize, table
from tests.benchmarks.site import Offer, Site, site
from tests.benchmarks.workloads import BY_NAME, Workload
from tests.lab import enter_lab
from tests.once import made_for_run

RMEM_MAX: Final = Path("/proc/sys/net/core/rmem_max")
BACKLOG_BUFFER: Final = 1 << 29
LADDER_BUFFER: Final = 1 << 25
"""Bytes: fanwire's own default."""
RECORDED: Final = Path(__file__).with_name("recorded.json")


@contextmanager
def large_buffers() -> Iterator[None]:
    """Let peers, who do not force it, have a receive buffer that holds a backlog; undone at the end.

    To be entered before the lab, from where this setting can't be reached.
    """
    with RMEM_MAX.open("r+") as file:
        before = file.read()
        file.seek(0)
        file.write(str(max(BACKLOG_BUFFER, int(before))))
        file.flush()
        try:
            yield
        finally:
            file.seek(0)
            file.write(before)


def run_backlog(results: Results, workload: Workload, here: Site, offer: Offer, options: argparse.Namespace) -> None:
    """Every program at every fan-out and way."""
    for fan_out in options.fan_out:
        for way in options.way:
            task = Task(workload.name, fan_out, way, BACKLOG_BUFFER)
            found = {
                name: backlog.measure(name, task, here, offer, options.rounds)
                for name in available(task, ["fanwire", *options.peers])
            }
            cells = summarize(task, found)
            for cell in cells:
                print(cell.line(), flush=True)
            results.cells += cells


def run_ladder(results: Results, workload: Workload, here: Site, offer: Offer, options: argparse.Namespace) -> None:
    """The highest rates without loss, from a third of what the backlog gave on."""
    for fan_out in options.fan_out:
        for way in options.way:
            task = Task(workload.name, fan_out, way, LADDER_BUFFER)
            for name in available(task, ["fanwire", *options.peers]):
                known = [
                    cell for cell in results.cells if (*cell.task, cell.program) == (workload.name, fan_out, way, name)
                ]
                climb = ladder.measure(name, task, here, offer, known[0].rate / 3 if known else 20_000)
                late = "  ".join(
                    f"at {share}: " + " ".join(f"{name} {us:,.0f}" for name, us in quantiles.items())
                    for share, quantiles in climb.late_us.items()
                )
                task_name = f"{workload.name:8} x{fan_out:<3} {way:9} {name:11}"
                print(f"{task_name} {climb.rate:10,.0f}/s without loss; us late {late}", flush=True)
                results.climbs.append(
                    {"workload": workload.name, "fan_out": fan_out, "way": way, "program": name, "rate": climb.rate,
                     "late_us": climb.late_us, "resident_mb": climb.resident_mb}
                )  # fmt: skip


def run_bare(results: Results, workload: Workload, here: Site, offer: Offer, program: Path, rounds: int) -> None:
    """Each stage beside a bare loop, for one collector."""
    with here.sinks(1) as sinks:
        sinks[0].discard()
        least = {"ingest.1": bare.receive_us(program, here, offer, BACKLOG_BUFFER, rounds)}
        least |= bare.send_us(program, here, workload, rounds)
    stages: dict[str, float] = {}
    for way in WAYS:
        stages |= bare.stages_us(Task(workload.name, 1, way, BACKLOG_BUFFER), here, offer, rounds)
    for stage, bare_us in least.items():
        us = stages[stage]
        ratio = f"{us / bare_us:.2f} x"
        print(f"{workload.name:8} {stage:11} {us:5.2f} us a datagram, bare loop {bare_us:5.2f}: {ratio}", flush=True)
        results.stages.append({"workload": workload.name, "stage": stage, "us": us, "bare_us": bare_us})


def run_scale(results: Results, way: Way, rounds: int) -> None:
    """Measure how the cost grows with each thing that there may be more of."""
    for grows, cases in scale.CASES.items():
        for case in cases:
            with site(scale.MTU) as here:
                cpu, lost = scale.measure(case, way, here, rounds)
            parts = " + ".join(f"{name} {us:.1f}" for name, us in cpu.items())
            print(f"{grows:10} {way:8} {case}  CPU {sum(cpu.values()):5.1f} us ({parts})  lost {lost:.2%}", flush=True)
            results.scale.append({"grows": grows, "way": way, **asdict(case), "cpu_us": cpu, "lost": lost})


def parse() -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workload", nargs="*", choices=BY_NAME)
    parser.add_argument("--fan-out", type=int, nargs="*")
    parser.add_argument("--way", nargs="*", choices=WAYS)
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument(
        "--ladder", action="store_true", help="also climb, which takes half a minute a program and task"
    )
    parser.add_argument("--scale", action="store_true", help="also measure how cost grows, some minutes a way")
    parser.add_argument("--json", type=Path, help="save all figures")
    parser.add_argument("--plot", type=Path, help="draw them, as PNG and SVG of this name; needs matplotlib")
    parser.add_argument(
        "--check", action="store_true", help="compare ratios with those recorded; exit 1 if some are worse"
    )
    parser.add_argument("--paced", action="store_true", help="measure steady rates instead")
    paced_run.add_options(parser)
    options = parser.parse_args()
    if not options.paced:
        options.workload = options.workload or list(BY_NAME)
        options.fan_out, options.way = options.fan_out or [1, 4, 16], options.way or list(WAYS)
    return options


def main() -> int:
    """Measure, print, save; return the exit code."""
    options = parse()
    if os.geteuid() != 0:
        sys.exit("needs root: for receive buffers that hold a backlog, for raw sockets, and for network namespaces")
    with large_buffers(), made_for_run():
        return paced_run.run(options) if options.paced else run_all(options)


def run_all(options: argparse.Namespace) -> int:
    """Measure by the backlog method, and by what else the options ask for; print, save; return the exit code."""
    results = Results("python -m tests.benchmarks " + " ".join(sys.argv[1:]))
    with bare.compiled() as program:
        if refused := enter_lab():
            sys.exit(f"needs a network namespace of its own, and {refused}")
        for workload in (BY_NAME[name] for name in options.workload):
            with site(workload.mtu) as here:
                offer = here.offer(workload)
                run_backlog(results, workload, here, offer, options)
                if program and 1 in options.fan_out and not workload.whole:
                    run_bare(results, workload, here, offer, program, options.rounds)
                if options.ladder:
                    run_ladder(results, workload, here, offer, options)
        for way in options.way if options.scale else ():
            run_scale(results, way, options.rounds)
    print(f"\n{', '.join(f'{key} {value}' for key, value in results.machine.items())}\n\n{table(results.cells)}")
    if options.json:
        results.write(options.json)
    if options.plot:
        plot(results, options.plot)
    worse = slower(Results.read(RECORDED), results) if options.check else []
    for sentence in worse:
        print(f"slower: {sentence}")
    return int(bool(worse))


if __name__ == "__main__":
    sys.exit(main())
