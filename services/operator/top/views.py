"""Views of a picture as rows of values: streams, exporters, collectors, the journal, nodes. No I/O."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Literal

from services.operator.cli.numbers import lasting
from shared.losses import causes
from shared.monitoring.picture import Collector, Picture
from shared.net.printable import printable

Value = str | float | None
"""A cell, by which rows are sorted too. None stands for what nothing has reported."""
Row = tuple[Value, ...]
Mode = Literal["rates", "totals"]
UNKNOWN: Final = "?"
SUFFIXES: Final = ((1e9, "G"), (1e6, "M"), (1e3, "k"))


def show_count(number: float) -> str:
    """Return a count with its thousands apart.

    >>> show_count(1234567)
    '1,234,567'
    """
    return f"{round(number):,}"


def show_short(number: float) -> str:
    """Return a number in three or four digits.

    >>> show_short(999), show_short(0.25), show_short(12_345), show_short(4_200_000)
    ('999', '0.2', '12.3k', '4.2M')
    """
    size, suffix = next(((size, suffix) for size, suffix in SUFFIXES if number >= size), (1, ""))
    return f"{number / size:.1f}{suffix}" if suffix or 0 < number < 1 else f"{number:.0f}"


def show_share(part: float) -> str:
    """Return a part of one in percent.

    >>> show_share(0.125)
    '12.5 %'
    """
    return f"{100 * part:.1f} %"


def _bits(byte_rate: float | None) -> float | None:
    return None if byte_rate is None else 8 * byte_rate


@dataclass(frozen=True, slots=True)
class Column:
    """A column: its values are text, or numbers that `show` writes. The least important ones make room for others."""

    name: str
    importance: int
    show: Callable[[float], str] | None = None
    mode: Mode | None = None
    """The mode in which it is shown; None: both."""

    def text(self, value: Value) -> str:
        """Return a value as it is shown."""
        if value is None:
            return UNKNOWN
        return self.show(value) if self.show and not isinstance(value, str) else printable(str(value))


@dataclass(frozen=True, slots=True)
class TableView:
    """A table of the picture. `by` is the number of the column that it is sorted by at first, largest first."""

    name: str
    columns: tuple[Column, ...]
    rows: Callable[[Picture], list[Row] | None]
    by: int

    def shown(self, mode: Mode) -> list[int]:
        """Return the numbers of the columns of a mode."""
        return [at for at, column in enumerate(self.columns) if column.mode in (None, mode)]


def _why(causes: Mapping[str, int]) -> str:
    return ", ".join(f"{cause} {count:,}" for cause, count in sorted(causes.items(), key=lambda each: -each[1]))


def _streams(picture: Picture) -> list[Row]:
    return [
        (
            *(each.name, each.rate, each.received, _bits(each.byte_rate), each.exporters, len(each.takers)),
            *(each.lost_rate, each.lost, _why(each.causes)),
        )
        for each in picture.streams
    ]


def _exporters(picture: Picture) -> list[Row] | None:
    if picture.exporters is None:
        return None
    return [
        (
            *(each.address, each.rate, _bits(each.byte_rate), each.share, each.missed, each.takers),
            *(", ".join(each.streams), ", ".join(each.workers)),
        )
        for each in picture.exporters
    ]


def _collectors(picture: Picture) -> list[Row] | None:
    if picture.collectors is None:
        return None
    return [
        (
            *(each.client.name, each.health, None if each.since is None else picture.at - each.since),
            *(each.rate, each.sent, _bits(each.byte_rate), each.held, _owed(each), _level_in(each)),
            *(each.lost_rate, each.lost, each.recent),
            *(_why(each.causes), ", ".join(each.client.streams)),
            *(f"{each.client.address} port {each.client.port}", each.client.source),
        )
        for each in picture.collectors
    ]


def _owed(collector: Collector) -> int | None:
    return None if collector.sent is None else sum(each.datagrams for each in collector.owed)


def _level_in(collector: Collector) -> float | None:
    """Return the seconds until a collector is level; 0: it is."""
    if collector.sent is None:
        return None
    known = [each.level_in for each in collector.owed]
    return max((each for each in known if each is not None), default=0.0) if None not in known else None


def _journal(picture: Picture) -> list[Row]:
    owed: Counter[str] = Counter()
    for each in picture.collectors or ():
        owed.update({past.stream: past.datagrams for past in each.owed})
    return [
        (
            *(
                each.stream,
                _time(each.since),
                _time(each.until),
                each.size,
                each.size / each.limit if each.limit else None,
            ),
            *(owed[each.stream], _why(causes(each.account)), each.service),
        )
        for each in picture.kept
    ]


def _nodes(picture: Picture) -> list[Row] | None:
    if picture.nodes is None:
        return None
    return [
        (
            *(each.name, each.state, None if each.age_ms < 0 else each.age_ms / 1000),
            *(each.pending, picture.served.get(each.name, 0)),
        )
        for each in picture.nodes.nodes
    ]


def _time(at: float | None) -> str:
    return "" if at is None else f"{datetime.fromtimestamp(at):%F %T}"


VIEWS: Final = (
    TableView(
        "streams",
        (
            Column("stream", 10),
            Column("per s", 9, show_short, "rates"),
            Column("received", 9, show_count, "totals"),
            Column("bit/s", 5, show_short),
            Column("exporters", 6, show_count),
            Column("collectors", 7, show_count),
            Column("lost/s", 8, show_short, "rates"),
            Column("lost", 8, show_count, "totals"),
            Column("lost by", 4),
        ),
        _streams,
        by=1,
    ),
    TableView(
        "exporters",
        (
            Column("exporter", 10),
            Column("per s", 9, show_short),
            Column("bit/s", 6, show_short),
            Column("share", 8, show_share),
            Column("gaps", 5, show_count),
            Column("collectors", 7, show_count),
            Column("streams", 5),
            Column("workers", 3),
        ),
        _exporters,
        by=1,
    ),
    TableView(
        "collectors",
        (
            Column("collector", 10),
            Column("health", 9),
            Column("for", 8, lasting),
            Column("per s", 9, show_short, "rates"),
            Column("sent", 9, show_count, "totals"),
            Column("bit/s", 4, show_short),
            Column("held", 5, show_count),
            Column("behind", 6, show_count),
            Column("level in", 5, lasting),
            Column("lost/s", 6, show_short, "rates"),
            Column("lost", 8, show_count, "totals"),
            Column("lost lately", 7, show_count),
            Column("lost by", 3),
            Column("streams", 2),
            Column("address", 1),
            Column("source", 0),
        ),
        _collectors,
        by=3,
    ),
    TableView(
        "journal",
        (
            Column("stream", 10),
            Column("since", 9),
            Column("until", 7),
            Column("bytes", 8, show_short),
            Column("of limit", 6, show_share),
            Column("owed", 8, show_count),
            Column("not kept", 5),
            Column("service", 1),
        ),
        _journal,
        by=3,
    ),
    TableView(
        "nodes",
        (
            Column("node", 10),
            Column("state", 9),
            Column("silent for", 7, lasting),
            Column("behind", 6, show_count),
            Column("collectors", 8, show_count),
        ),
        _nodes,
        by=4,
    ),
)
"""In the order of their keys, 1 to 5."""


def select(rows: Sequence[Row], text: str, by: int, *, descending: bool) -> list[Row]:
    """Return the rows that have the text in any cell, sorted by a column; what is unknown comes last."""
    wanted = text.casefold()
    found = [row for row in rows if not wanted or any(wanted in str(cell).casefold() for cell in row)]
    known = [row for row in found if row[by] is not None]
    known.sort(key=lambda row: row[by], reverse=descending)  # type: ignore[arg-type, return-value]
    return known + [row for row in found if row[by] is None]


def lines(picture: Picture) -> list[str]:
    """Return the picture as lines for other programs: kind, name and NAME=VALUE, with tabs between them."""
    verdict = picture.verdict
    found = ["\t".join(["fanwire", verdict.level, *map(printable, verdict.reasons)])]
    for view in VIEWS:
        for row in view.rows(picture) or ():
            name, *values = row
            told = zip((column.name.replace(" ", "_") for column in view.columns[1:]), values, strict=True)
            pairs = (f"{key}={_plain(value)}" for key, value in told if value is not None and value != "")
            found.append("\t".join([view.name.removesuffix("s"), printable(str(name)), *pairs]))
    return found


def _plain(value: Value) -> str:
    return f"{value:.10g}" if isinstance(value, float) else printable(str(value))
