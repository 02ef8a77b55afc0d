"""Results of a run: a line each for people, rows for the JSON, and the figures of README.md."""

import json
import os
import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from tests.benchmarks.backlog import Round
from tests.benchmarks.programs import Task

TIMES: Final = "\u00d7"
SLOWER: Final = 0.85
"""A ratio to a peer that is below so much of the recorded one is a regression: what is between is noise."""


@dataclass
class Cell:
    """A program at a task, by the backlog method: medians. `ratio` is how many times faster fanwire is."""

    workload: str
    fan_out: int
    way: str
    program: str
    rate: float
    cpu_us: dict[str, float]
    lost: int
    in_order: bool
    resident_mb: float
    ratio: float = 1.0
    cpu_ratio: float = 1.0

    @property
    def task(self) -> tuple[str, int, str]:
        """Return the task at which several programs are compared."""
        return self.workload, self.fan_out, self.way

    @property
    def cpu_total_us(self) -> float:
        """CPU µs a datagram received, all processes together."""
        return sum(self.cpu_us.values())

    def line(self) -> str:
        """For people."""
        parts = " + ".join(f"{name} {value:.2f}" for name, value in self.cpu_us.items())
        order = "" if self.in_order else "  order not kept, or copies twice"
        return (
            f"{self.workload:8} x{self.fan_out:<3} {self.way:9} {self.program:11} {self.rate:10,.0f}/s"
            f"  fanwire is {self.ratio:5.2f} x  CPU {self.cpu_total_us:6.2f} us ({parts})"
            f"  lost {self.lost}  {self.resident_mb:.0f} MB{order}"
        )


@dataclass
class Results:
    """All of a run."""

    command: str
    machine: dict[str, str] = field(default_factory=lambda: describe_machine())
    cells: list[Cell] = field(default_factory=list)
    climbs: list[dict[str, Any]] = field(default_factory=list)
    stages: list[dict[str, Any]] = field(default_factory=list)
    scale: list[dict[str, Any]] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """Save it as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> "Results":
        """Read what `write` saved."""
        data = json.loads(path.read_text())
        return cls(**{**data, "cells": [Cell(**each) for each in data["cells"]]})


def describe_machine() -> dict[str, str]:
    """Processor, cores, kernel, Python."""
    models = [line.partition(":")[2] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return {
        "processor": (models or [platform.machine()])[0].strip(),
        "cores": str(os.cpu_count()),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def summarize(task: Task, found: Mapping[str, Sequence[Round]]) -> list[Cell]:
    """Medians of each program's rounds, compared with fanwire's."""
    cells = []
    for program, rounds in found.items():
        cpu = {name: statistics.median(each.cpu_us[name] for each in rounds) for name in rounds[0].cpu_us}
        rate = statistics.median(each.rate for each in rounds)
        lost, in_order = sum(each.lost for each in rounds), all(each.in_order for each in rounds)
        memory = max(each.resident_mb for each in rounds)
        cells.append(Cell(task.workload, task.fan_out, task.way, program, rate, cpu, lost, in_order, memory))
    for cell in cells[1:]:
        cell.ratio = cells[0].rate / cell.rate
        cell.cpu_ratio = cell.cpu_total_us / cells[0].cpu_total_us
    return cells


def table(cells: Iterable[Cell]) -> str:
    """The table of README.md beside: a line a task."""
    by_task: dict[tuple[str, int, str], list[Cell]] = {}
    for cell in cells:
        by_task.setdefault(cell.task, []).append(cell)
    lines = [
        "| workload | collectors | way | datagrams/s to each | against samplicator | against the best other "
        "| CPU µs: ingest + broker + sender | samplicator |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (workload, fan_out, way), (ours, *peers) in by_task.items():
        samplicator = next((cell for cell in peers if cell.program == "samplicate"), None)
        others = sorted((cell for cell in peers if cell is not samplicator), key=lambda cell: cell.rate)
        best = f"{others[-1].ratio:.1f} {TIMES} ({others[-1].program})" if others else ""
        theirs = (f"{samplicator.ratio:.1f} {TIMES}", f"{samplicator.cpu_total_us:.1f}") if samplicator else ("", "")
        cpu = " + ".join(f"{value:.1f}" for value in ours.cpu_us.values())
        rate = f"{ours.rate / 1000:,.0f} k"
        lines.append("| " + " | ".join([workload, str(fan_out), way, rate, theirs[0], best, cpu, theirs[1]]) + " |")
    return "\n".join(lines)


def slower(recorded: Results, now: Results) -> list[str]:
    """Return a sentence for each result that has become slower beside the same peers."""
    before = {(*cell.task, cell.program): cell for cell in recorded.cells}
    found = []
    for cell in now.cells:
        was = before.get((*cell.task, cell.program))
        if was is None or cell.program == "fanwire":
            continue
        name = f"{cell.workload} x{cell.fan_out} {cell.way}"
        if cell.ratio < SLOWER * was.ratio:
            found.append(f"{name}: {cell.ratio:.2f} x {cell.program}, was {was.ratio:.2f} x")
        if cell.cpu_ratio < SLOWER * was.cpu_ratio:
            found.append(f"{name}: {cell.program} costs {cell.cpu_ratio:.2f} x our CPU, was {was.cpu_ratio:.2f} x")
    return found


def plot(results: Results, base: Path) -> None:
    """Draw rates and CPU by task and program, as PNG and SVG. ImportError without matplotlib."""
    from matplotlib.figure import Figure  # only for who draws

    tasks = list(dict.fromkeys(cell.task for cell in results.cells))
    programs = list(dict.fromkeys(cell.program for cell in results.cells))
    figure = Figure(figsize=(max(8, len(tasks) * 0.75), 8), layout="constrained")
    rates, cpu = figure.subplots(2, 1, sharex=True)
    width = 0.8 / len(programs)
    for number, program in enumerate(programs):
        cells = {cell.task: cell for cell in results.cells if cell.program == program}
        places = [place + number * width for place, task in enumerate(tasks) if task in cells]
        rates.bar(places, [cells[task].rate / 1000 for task in tasks if task in cells], width, label=program)
        cpu.bar(places, [cells[task].cpu_total_us for task in tasks if task in cells], width)
    rates.set(ylabel="thousand datagrams/s to each collector", yscale="log")
    cpu.set(ylabel="CPU µs a datagram received", yscale="log")
    centre = 0.4 - width / 2
    labels = [f"{workload} {TIMES}{fan_out}\n{way}" for workload, fan_out, way in tasks]
    cpu.set_xticks([place + centre for place in range(len(tasks))], labels, rotation=90)
    for axes in (rates, cpu):
        axes.grid(axis="y", alpha=0.3)
    rates.legend(ncols=len(programs), loc="upper right")
    machine = results.machine
    rates.set_title(f"{machine['processor']}, {machine['cores']} cores, Linux {machine['kernel']}, medians")
    for suffix in (".png", ".svg"):
        figure.savefig(base.with_suffix(suffix), dpi=120)
