"""Keeps a run of the paced method: as JSON to compare with, and in the tables of this README and of the front page."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tests.benchmarks import paced_report
from tests.benchmarks.paced_report import Cell, cpu_words, late_words, lost_words, table

JSON: Final = Path(__file__).with_name("recorded_paced.json")
TABLE: Final = Path(__file__).with_name("README.md")
FRONT: Final = Path(__file__).parents[2] / "README.md"
FRONT_ROWS: Final = ((100, 1), (1_000, 1), (50_000, 4))
"""Datagrams a second, and collectors, of the rows that stand on the front page."""


def keep(command: str, cells: Sequence[Cell]) -> None:
    """Write all three."""
    paced_report.write(JSON, command, cells)
    TABLE.write_text(replace_table(TABLE.read_text(), table(cells)))
    FRONT.write_text(replace_rows(FRONT.read_text(), front_rows(cells)))


def replace_table(text: str, fresh: str) -> str:
    """Put a table in the place of the one that begins with the same two words. ValueError when there is none."""
    begin = " | ".join(fresh.split(" | ")[:2])
    start = text.index(f"\n{begin}") + 1
    return text[:start] + fresh + text[text.index("\n\n", start) :]


def replace_rows(text: str, rows: Sequence[str]) -> str:
    """Put rows of a table in the place of those with the same first column. ValueError when there is none."""
    for row in rows:
        start = text.index("\n" + row[: row.index(" |") + 2]) + 1
        text = text[:start] + row + text[text.index("\n", start) :]
    return text


def front_rows(cells: Sequence[Cell]) -> list[str]:
    """Return the rows of the front page: the load, fanwire, samplicator."""
    rows = []
    for rate, fan_out in FRONT_ROWS:
        found = {
            cell.program: cell for cell in cells if (cell.load.rate, cell.fan_out, cell.way) == (rate, fan_out, "relay")
        }
        collectors = f"{fan_out} collector{'s' * (fan_out > 1)}"
        told = [_told(found[program]) for program in ("fanwire", "samplicate")]
        rows.append(f"| {rate:,} datagrams/s, {collectors} | {told[0]} | {told[1]} |")
    return rows


def _told(cell: Cell) -> str:
    return f"{cpu_words(cell)} %{lost_words(cell)}, late by {late_words(cell)} ms"
