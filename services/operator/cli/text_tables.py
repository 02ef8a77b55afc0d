"""Tables on the terminal. rich is imported for the first one, so that `watch` starts without it."""

import shutil
import sys
from collections.abc import Collection, Iterable, Sequence
from textwrap import wrap
from typing import Final

from shared.net.printable import printable

WIDTH: Final = 250
"""Columns that a table may take where nobody looks at it as it is printed: lines of a file are searched, not folded."""
PLAIN_ABOVE: Final = 1000
"""Rows: rich takes half a millisecond for each, and nobody reads more than this in a box."""
COLUMN_SIDES: Final = 3
"""Characters beside a column: a space on each side, and one between columns."""
Cell = str | int | None
Row = list[str | int]


def print_table(
    title: str, columns: Sequence[str], table_rows: Iterable[Sequence[Cell]], totals: Collection[str] = ()
) -> None:
    """Print rows under a title, numbers flush right, empty columns left out, and the totals of some columns.

    On a narrow terminal, columns of zeros are left out too, and where that is not enough each row is a paragraph. Very
    many rows go out tab-separated.
    """
    rows = [[_shown(cell) for cell in row] for row in table_rows]
    if totals and len(rows) > 1:
        sums = [
            sum(cell for row in rows if isinstance(cell := row[at], int)) if name in totals else ""
            for at, name in enumerate(columns)
        ]
        rows.append(["total", *sums[1:]])
    columns, rows = _without(columns, rows, ("",))
    if len(rows) > PLAIN_ABOVE:
        lines: list[list[str]] = [[*columns], *([str(cell) for cell in row] for row in rows)]
        sys.stdout.writelines("\t".join(line) + "\n" for line in lines)
        return
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else WIDTH
    shown = _render(title, columns, rows, width) or _render(title, *_without(columns, rows, ("", 0)), width)
    sys.stdout.write(shown or _paragraphs(title, columns, rows, width))


def _shown(cell: Cell) -> str | int:
    return printable(cell) if isinstance(cell, str) else "" if cell is None else cell


def _without(columns: Sequence[str], rows: list[Row], said: Collection[str | int]) -> tuple[list[str], list[Row]]:
    """Leave out the columns whose cells all say no more than this."""
    kept = [at for at in range(len(columns)) if not rows or any(row[at] not in said for row in rows)]
    return [columns[at] for at in kept], [[row[at] for at in kept] for row in rows]


def _render(title: str, columns: Sequence[str], rows: list[Row], width: int) -> str:
    """Return the table, or nothing if it would have to break words."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    widths = fit(columns, rows, width)
    if widths is None and width < WIDTH:
        return ""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for at, column in enumerate(columns):
        table.add_column(column, overflow="fold", width=widths[at] if widths else None)
    for row in rows:
        # Text, since names come from the network and may look like markup.
        table.add_row(*(Text(str(cell), justify="right" if isinstance(cell, int) else "left") for cell in row))
    # rich would answer a closed pipe with exit code 1, so it only renders.
    console = Console(width=width)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def fit(columns: Sequence[str], rows: Sequence[Sequence[str | int]], width: int) -> list[int] | None:
    """Return the widths of columns with which a table is no wider than `width`; None if words would have to break."""
    from rich.cells import cell_len

    texts = [[name, *(str(row[at]) for row in rows)] for at, name in enumerate(columns)]
    widths = [max(map(cell_len, column)) for column in texts]
    words = [max((cell_len(word) for cell in column for word in cell.split()), default=0) for column in texts]
    room = width - COLUMN_SIDES * len(columns) - 1
    while sum(widths) > room:
        at = max(range(len(widths)), key=lambda at: widths[at] - words[at])
        if widths[at] == words[at]:
            return None
        widths[at] -= 1
    return widths


def _paragraphs(title: str, columns: Sequence[str], rows: list[Row], width: int) -> str:
    """Return each row as lines of a column and its value."""
    indent = max(map(len, columns)) + 4
    lines = [title]
    for row in rows:
        lines.append("")
        for name, cell in zip(columns, row, strict=True):
            for part in wrap(str(cell), max(20, width - indent), break_long_words=False):
                lines.append(f"  {name:{indent - 2}}{part}")
                name = ""
    return "\n".join(lines) + "\n"
