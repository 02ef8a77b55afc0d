"""A frame of `top`: lines that fit the terminal, by rich. Only the rows that are seen are drawn."""

import time
from collections.abc import Sequence
from io import StringIO
from typing import Final

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text

from services.operator.cli.numbers import counted, lasting
from services.operator.top.state import KEYS, ScreenState
from services.operator.top.views import UNKNOWN, VIEWS, Column, Row, select, show_short
from shared.monitoring.picture import Picture
from shared.net.printable import printable

STYLES: Final = {"ok": "green", "warning": "yellow", "error": "red", "unknown": "dim"}
HEALTH: Final = {"refusing": "red", "unreachable": "red", "waiting": "red", "slow": "yellow", "unknown": "dim"}
BETWEEN: Final = 2
"""Spaces between columns."""
WIDEST: Final = 40
"""Characters that a column may take while others need room."""
AROUND: Final = 6
"""Lines that are no rows: three above the view's name, that, the columns' names, and the keys."""


def draw(state: ScreenState, picture: Picture | None, width: int, height: int, said: str = "") -> str:
    """Return a frame of at most this many lines, without a line feed at its end; `said` stands in for a picture.

    A height of 0 shows all rows.
    """
    lines = [_head(state, picture, said)]
    if state.helping:
        lines += [Text(), *(Text(f"  {keys:14}{does}") for keys, does in KEYS), Text(), Text("  any key goes back")]
    elif picture is not None:
        lines += [Text(printable("; ".join(picture.verdict.reasons)), STYLES[picture.verdict.level]), _sums(picture)]
        lines += [*_table(state, picture, width, height), _foot(state)]
    console = Console(file=StringIO(), width=width, force_terminal=True, highlight=False)
    with console.capture() as capture:
        for line in lines[: height or None]:
            console.print(line, no_wrap=True, overflow="crop")
    return capture.get().rstrip("\n")


def _head(state: ScreenState, picture: Picture | None, said: str) -> Text:
    level = picture.verdict.level if picture else "unknown"
    line = Text.assemble(("fanwire", "bold"), "  ", (level if picture else said, STYLES[level]))
    return line.append(time.strftime("  %H:%M:%S") + ("  paused" if state.paused else ""))


def _sums(picture: Picture) -> Text:
    came = _sum([stream.rate for stream in picture.streams])
    went = _sum([collector.rate for collector in picture.collectors or ()])
    lost = sum(loss.recent for loss in picture.losses)
    running = counted(sum(not service.silent for service in picture.services), "service")
    seen = lasting(picture.recent_seconds)
    return Text(f"{running}, {came} datagrams/s in, {went} copies/s out, {lost:,} lost in {seen}")


def _sum(rates: Sequence[float | None]) -> str:
    known = [rate for rate in rates if rate is not None]
    return show_short(sum(known)) if known else UNKNOWN


def _table(state: ScreenState, picture: Picture, width: int, height: int) -> list[Text]:
    view, sorting = state.view, state.sorting
    tabs = Text()
    for number, each in enumerate(VIEWS, 1):
        rows = each.rows(picture)
        if each.name == "nodes" and rows is None and each is not view:
            continue  # this host is no node, and the others need the room
        name = f"{number} {each.name} {UNKNOWN if rows is None else len(rows)}"
        tabs.append(f" {name} ", "reverse" if each is view else "").append(" ")
    found = select(view.rows(picture) or [], state.filter, sorting.by, descending=sorting.descending)
    state.rows, state.page = len(found), max(1, height - AROUND) if height else len(found)
    state.keep_in_range()
    seen = found[state.top : state.top + state.page]
    if state.filter:
        tabs.append(f' "{state.filter}": {len(found)}')
    if len(seen) < len(found):
        tabs.append(f" rows {state.top + 1} to {state.top + len(seen)} of {len(found)}")
    columns = [(at, view.columns[at]) for at in view.shown(state.mode)]
    texts = [(column, [column.text(row[at]) for row in seen]) for at, column in columns]
    widths = fit_columns(texts, width, view.columns[sorting.by])
    shown = [(at, column, widths[column.name]) for at, column in columns if column.name in widths]
    names = Text(style="bold")
    for at, column, size in shown:
        mark = ("▼" if sorting.descending else "▲") if at == sorting.by else ""
        names.append(_sized(column.name + mark, size, left=column.show is None)).append(" " * BETWEEN)
    return [tabs, names, *(_line(row, shown) for row in seen)]


def fit_columns(columns: Sequence[tuple[Column, Sequence[str]]], width: int, kept: Column) -> dict[str, int]:
    """Return the widths of the columns that fit, by name. The least important ones go first, `kept` never.

    Text that is cut is better than a column that is missing, as far as half of it can be seen.
    """
    wanted = {column.name: max([cell_len(column.name) + 1, *map(cell_len, texts)]) for column, texts in columns}
    sizes = {name: min(size, WIDEST) for name, size in wanted.items()}
    by_importance = sorted(
        (column for column, _ in columns if column is not kept), key=lambda column: column.importance
    )
    for column in by_importance[:-1]:
        over = sum(sizes.values()) + BETWEEN * (len(sizes) - 1) - width
        if over <= 0:
            break
        if column.show is None and sizes[column.name] - over >= max(8, sizes[column.name] // 2):
            sizes[column.name] -= over
        else:
            del sizes[column.name]
    spare = width - sum(sizes.values()) - BETWEEN * (len(sizes) - 1)
    for name in sizes:
        more = max(0, min(spare, wanted[name] - sizes[name]))
        sizes[name] += more
        spare -= more
    return sizes


def _line(row: Row, shown: Sequence[tuple[int, Column, int]]) -> Text:
    line = Text()
    for at, column, size in shown:
        value = row[at]
        style = HEALTH.get(str(value), "") if column.name == "health" else ""
        if column.name.startswith("lost") and value not in (0, None, ""):
            style = "yellow"
        line.append(_sized(column.text(value), size, left=column.show is None), style).append(" " * BETWEEN)
    return line


def _sized(text: str, size: int, *, left: bool) -> str:
    """Return a text in exactly so many cells of the terminal; one that is cut ends in a mark."""
    if cell_len(text) > size:
        return set_cell_size(text, size - 1) + "…"
    return text + " " * (size - cell_len(text)) if left else " " * (size - cell_len(text)) + text


def _foot(state: ScreenState) -> Text:
    if state.typing:
        return Text(f"filter: {state.filter}_", "reverse")
    other = "rates" if state.mode == "totals" else "totals"
    return Text(f"1-5 view  s sort  r turn  / filter  t {other}  p pause  ? help  q end", "dim")
