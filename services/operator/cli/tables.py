"""Tables on the terminal. rich is imported for the first one, so that `watch` starts without it."""

import sys
from collections.abc import Iterable, Sequence
from typing import Final

from shared.net.printable import printable

WIDTH: Final = 250
"""Columns a table may take. A narrower terminal wraps lines, which can still be searched; folded cells can't."""
PLAIN_ABOVE: Final = 1000
"""Rows: rich takes half a millisecond for each, and nobody reads more than this in a box."""
Cell = str | int | None


def print_table(title: str, columns: Sequence[str], table_rows: Iterable[Sequence[Cell]]) -> None:
    """Print rows under a title, numbers flush right, empty columns left out. Very many rows go out tab-separated."""
    cells = [[_shown(cell) for cell in row] for row in table_rows]
    told = [number for number in range(len(columns)) if not cells or any(row[number] != "" for row in cells)]
    columns = [columns[number] for number in told]
    rows = [[row[number] for number in told] for row in cells]
    if len(rows) > PLAIN_ABOVE:
        lines: list[list[str]] = [columns, *([str(cell) for cell in row] for row in rows)]
        sys.stdout.writelines("\t".join(line) + "\n" for line in lines)
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        # Text, since names come from the network and may look like markup.
        table.add_row(*(
            Text(str(cell), justify="right" if isinstance(cell, int) else "left") for cell in row
        ))  # fmt: skip
    console = Console(width=WIDTH)
    # rich would answer a closed pipe with exit code 1, so it only renders.
    with console.capture() as capture:
        console.print(table)
    sys.stdout.write(capture.get())


def _shown(cell: Cell) -> str | int:
    return printable(cell) if isinstance(cell, str) else "" if cell is None else cell
