"""Results of the paced method: a line a cell for people, a table in Markdown, and a list of what has become worse."""

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from tests.benchmarks.paced import Load, Reading
from tests.benchmarks.report import SLOWER, describe_machine

LATER: Final = 1.5
"""A lateness of so many times that of the record, and half a millisecond more, is a regression."""
TITLES: Final = {"samplicate": "samplicator"}
SHORT_OF: Final = 0.97
"""Of the rate, less offered means that the exporters did not keep up: such a cell says so."""


@dataclass(frozen=True)
class Cell:
    """A program with a load: medians."""

    program: str
    way: str
    fan_out: int
    load: Load
    cpu: dict[str, float]
    wakeups: float
    late_us: dict[str, float]
    offered: float
    lost: float
    in_order: bool

    @property
    def task(self) -> tuple[str, int, Load]:
        """Return the task at which several programs are compared."""
        return self.way, self.fan_out, self.load

    @property
    def cpu_total(self) -> float:
        """Per cent of a core, all processes."""
        return sum(self.cpu.values())

    def line(self) -> str:
        """For people."""
        load, late = self.load, " ".join(f"{us / 1000:.2f}" for us in self.late_us.values())
        parts = " + ".join(f"{name} {value:.2f}" for name, value in self.cpu.items())
        slow = f"  ONLY {self.offered:,.0f}/s OFFERED" if self.offered < SHORT_OF * load.rate else ""
        return (
            f"{load.workload:7} {load.sources:>3} {load.spacing:6} x{self.fan_out:<2} {self.way:8} {load.rate:>7,}/s "
            f"{self.program:10} CPU {self.cpu_total:6.2f} % ({parts})  {self.wakeups:7,.0f} wake-ups/s"
            f"  ms late {late}  lost {self.lost:.3%}{slow}{'' if self.in_order else '  ORDER NOT KEPT'}"
        )


def summarize(program: str, way: str, fan_out: int, load: Load, readings: Sequence[Reading]) -> Cell:
    """Medians of the rounds of one program."""

    def median(values: Iterable[float]) -> float:
        return statistics.median(values)

    expected, arrived = sum(each.expected for each in readings), sum(each.arrived for each in readings)
    return Cell(
        program,
        way,
        fan_out,
        load,
        {name: median(each.cpu[name] for each in readings) for name in readings[0].cpu},
        median(each.wakeups for each in readings),
        {name: median(each.late_us[name] for each in readings) for name in readings[0].late_us},
        median(each.offered for each in readings),
        1 - arrived / expected if expected else 0.0,
        all(each.in_order for each in readings),
    )


def table(cells: Sequence[Cell]) -> str:
    """Return lines in Markdown, a load each: fanwire first, then its peers, each with its CPU as part of theirs."""
    programs = list(dict.fromkeys(cell.program for cell in cells))
    by_task: dict[tuple[str, int, Load], dict[str, Cell]] = {}
    for cell in sorted(cells, key=lambda cell: (cell.load.rate, cell.way != "relay", cell.fan_out)):
        by_task.setdefault(cell.task, {})[cell.program] = cell
    loads = {(load.workload, load.sources, load.spacing) for _, _, load in by_task}
    heads = [*["load"][: len(loads) - 1], "datagrams/s", "way", "collectors"]
    for program in programs:
        heads += [f"{TITLES.get(program, program)}: CPU %", "p50, p99 ms", "wake-ups/s"]
        heads += ["fanwire's CPU"] if program != "fanwire" else []
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for (way, fan_out, load), row in by_task.items():
        words = [f"{load.workload}, {load.sources} {load.spacing}"][: len(loads) - 1]
        words += [f"{load.rate:,}", way, str(fan_out)]
        for program in programs:
            words += _words(row.get(program))
            words += [_ratio(row["fanwire"], row.get(program))] if program != "fanwire" else []
        lines.append("| " + " | ".join(words) + " |")
    return "\n".join(lines)


def cpu_words(cell: Cell) -> str:
    """Return the CPU in per cent of a core."""
    return f"{cell.cpu_total:.{2 if cell.cpu_total < 1 else 1 if cell.cpu_total < 10 else 0}f}"


def lost_words(cell: Cell) -> str:
    """Return the loss, if there is one, to stand behind the CPU."""
    return f" (lost {100 * cell.lost:.1f} %)" if cell.lost >= 0.0005 else ""


def late_words(cell: Cell) -> str:
    """Return p50 and p99 in ms; nothing without a load."""
    late = [cell.late_us[name] / 1000 for name in ("p50", "p99") if name in cell.late_us]
    return ", ".join(f"{ms:.2f}" if ms < 1 else f"{ms:.1f}" for ms in late)


def _words(cell: Cell | None) -> list[str]:
    return [cpu_words(cell) + lost_words(cell), late_words(cell), f"{cell.wakeups:,.0f}"] if cell else [""] * 3


def _ratio(fanwire: Cell, other: Cell | None) -> str:
    if other is None or not fanwire.load.rate or not other.cpu_total:
        return ""
    return f"{fanwire.cpu_total / other.cpu_total:.{1 if fanwire.cpu_total > 3 * other.cpu_total else 2}f} times"


def write(path: Path, command: str, cells: Sequence[Cell]) -> None:
    """Save a run as JSON."""
    data = {"command": command, "machine": describe_machine(), "cells": [asdict(cell) for cell in cells]}
    path.write_text(json.dumps(data, indent=1) + "\n")


def read(path: Path) -> list[Cell]:
    """Read the cells that `write` saved."""

    def cell(fields: dict[str, Any]) -> Cell:
        return Cell(**{**fields, "load": Load(**fields["load"])})

    return [cell(fields) for fields in json.loads(path.read_text())["cells"]]


def worse(recorded: Sequence[Cell], now: Sequence[Cell]) -> list[str]:
    """Return a sentence for each result of fanwire that has become worse beside the same peers."""
    before = {(*cell.task, cell.program): cell for cell in recorded}
    ours = {cell.task: cell for cell in now if cell.program == "fanwire"}
    found = []
    for cell in now:
        was, mine = before.get((*cell.task, cell.program)), ours[cell.task]
        was_mine = before.get((*cell.task, "fanwire"))
        if was is None or was_mine is None:
            continue
        load = cell.load
        name = f"{load.workload}, {load.sources} {load.spacing}, x{cell.fan_out} {cell.way}, {load.rate}/s"
        if cell is mine:
            found += [f"{name}: lost {cell.lost:.3%}, was nothing"] if cell.lost > was.lost == 0 else []
            found += [] if cell.in_order else [f"{name}: order not kept"]
            late, then = cell.late_us.get("p50", 0), was.late_us.get("p50", 0)
            found += [f"{name}: {late:,.0f} us late, was {then:,.0f}"] if late > LATER * then + 500 else []
        elif cell.cpu_total and was.cpu_total:
            ratio, then = mine.cpu_total / cell.cpu_total, was_mine.cpu_total / was.cpu_total
            found += [f"{name}: {ratio:.2f} x {cell.program}'s CPU, was {then:.2f} x"] if ratio * SLOWER > then else []
    return found
