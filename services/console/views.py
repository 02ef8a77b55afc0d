"""Pictures as the page gets them: plain values for JSON, the rows that were asked for and no more. No I/O."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from services.console.history import History
from shared.ledger.counters import WRITE_ERRNO
from shared.losses import kind_of
from shared.monitoring.journal import KeptStream
from shared.monitoring.picture import NO_TROUBLE, Collector, Exporter, Picture, Stream
from shared.net.addresses import pack_address

MAX_ROWS: Final = 200
"""Rows of a table that a page gets; it says how many there are, and finds others by a filter."""
MAX_LOSSES: Final = 100
MAX_OWED: Final = 5
"""Collectors that a row of the journal names."""
SPARK_STEPS: Final = 60
"""Steps of the line in a row: five minutes."""
FLOW_EXPORTERS: Final = 8
FLOW_COLLECTORS: Final = 12
FLOW_STREAMS: Final = 12
"""Nodes of the diagram; the rest are one node together."""

View = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Wish:
    """The wishes of a page: the order of each table, and a text that names contain."""

    collectors: str = "trouble"
    exporters: str = "rate"
    text: str = ""


_RANKS: Final = {
    word: rank
    for rank, word in enumerate(
        ("unreachable", "refusing", "waiting", "slow", "withheld", "unknown", "elsewhere", "ok")
    )
}
COLLECTOR_ORDERS: Final[Mapping[str, Callable[[Collector], Any]]] = {
    "trouble": lambda each: (_RANKS[each.health], -(each.recent or 0), each.client.name),
    "name": lambda each: each.client.name,
    "rate": lambda each: -(each.rate or 0),
    "lost": lambda each: -(each.lost or 0),
    "recent": lambda each: -(each.recent or 0),
    "held": lambda each: -(each.held or 0),
}
EXPORTER_ORDERS: Final[Mapping[str, Callable[[Exporter], Any]]] = {
    "rate": lambda each: -each.rate,
    "bytes": lambda each: -each.byte_rate,
    "name": lambda each: each.address,
    "gaps": lambda each: -(each.missed or 0),
    "untaken": lambda each: (each.takers > 0, -each.rate),
}


def show(picture: Picture, history: History, wish: Wish, clock: float, *, whole: bool) -> View:
    """Return everything for a page. `clock` is what to add for Unix time; `whole`: with the past of each row."""
    collectors = picture.collectors
    exporters = picture.exporters
    untaken = None if exporters is None else sum(each.takers == 0 for each in exporters)
    return {
        "at": round(picture.at + clock, 2),
        "verdict": {"level": picture.verdict.level, "reasons": picture.verdict.reasons},
        "balanced": picture.balanced,
        "recent_seconds": round(picture.recent_seconds),
        "totals": {
            "received": _sum(each.rate for each in picture.streams),
            "bytes": _sum(each.byte_rate for each in picture.streams),
            "sent": None if collectors is None else _sum(each.rate for each in collectors),
            "lost": sum(each.recent for each in picture.losses) if picture.services else None,
            "troubled": None if collectors is None else sum(each.health not in NO_TROUBLE for each in collectors),
            "untaken": untaken,
        },
        "streams": [
            show_stream(each) | ({"past": history.rates("stream", each.name, SPARK_STEPS)} if whole else {})
            for each in picture.streams
        ],
        "collectors": None
        if collectors is None
        else _table(
            collectors,
            COLLECTOR_ORDERS.get(wish.collectors, COLLECTOR_ORDERS["trouble"]),
            wish.text,
            lambda each: f"{each.client.name} {each.client.address} {' '.join(each.client.streams)}",
            lambda each: (
                show_collector(each, clock)
                | ({"past": history.rates("collector", each.client.name, SPARK_STEPS)} if whole else {})
            ),
        ),
        "exporters": None
        if exporters is None
        else _table(
            exporters,
            EXPORTER_ORDERS.get(wish.exporters, EXPORTER_ORDERS["rate"]),
            wish.text,
            lambda each: f"{each.address} {' '.join(each.streams)}",
            lambda each: (
                show_exporter(each) | ({"past": history.rates("exporter", each.address, SPARK_STEPS)} if whole else {})
            ),
        ),
        "services": [
            {
                "name": each.name,
                "pid": each.pid,
                "started": round(each.started, 1),
                "silent": each.silent,
                "heard": round(each.heard_at + clock, 1),
                "memory": each.memory,
                "most": each.memory_most,
                "ceiling": each.memory_ceiling,
            }
            for each in picture.services
        ],
        "losses": [
            {
                "place": loss.place,
                "service": loss.service,
                "of": loss.of,
                "lost": loss.lost,
                "what": loss.what,
                "recent": recent,
                "kind": "overflow" if loss.place in ("upstream", "kernel") else kind_of(_cause(loss.place, loss.what)),
            }
            for loss, recent in sorted(
                ((each.loss, each.recent) for each in picture.losses), key=lambda each: (-each[1], -each[0].lost)
            )[:MAX_LOSSES]
        ],
        "all_losses": len(picture.losses),
        "journal": [show_kept(each, collectors or ()) for each in picture.kept],
        "nodes": show_nodes(picture),
        "flow": flow(picture),
    }


def _cause(place: str, what: str) -> str:
    return "missed" if place == "bus" and what.startswith("datagrams") else what


def _table(
    rows: Sequence[Any],
    order: Callable[[Any], Any],
    text: str,
    names: Callable[[Any], str],
    render: Callable[[Any], View],
) -> View:
    found = [row for row in rows if text.lower() in names(row).lower()] if text else rows
    shown = sorted(found, key=order)[:MAX_ROWS]
    return {"all": len(rows), "found": len(found), "rows": [render(row) for row in shown]}


def show_kept(kept: KeptStream, collectors: Iterable[Collector]) -> View:
    """Return the row of a stream in the journal, with the collectors that are owed some of it."""
    owed = [
        {"collector": past.collector, "datagrams": past.datagrams}
        for each in collectors
        for past in each.owed
        if past.stream == kept.stream
    ]
    return {
        "stream": kept.stream,
        "since": kept.since,
        "until": kept.until,
        "bytes": kept.size,
        "limit": kept.limit,
        "failing": bool(kept.account.get(WRITE_ERRNO)),
        "owed": owed[:MAX_OWED],
        "all_owed": len(owed),
    }


def show_nodes(picture: Picture) -> View | None:
    """Return the rows of a cluster's nodes; None: this host is none."""
    if picture.nodes is None:
        return None
    return {
        "majority": picture.nodes.majority,
        "rows": [
            {
                "name": each.name,
                "state": each.state,
                "silent": None if each.age_ms < 0 else each.age_ms / 1000,
                "behind": each.pending,
                "collectors": picture.served.get(each.name, 0),
            }
            for each in picture.nodes.nodes
        ],
    }


def show_stream(stream: Stream) -> View:
    """Return a stream's row."""
    return {
        "name": stream.name,
        "received": stream.received,
        "rate": _round(stream.rate),
        "bytes": _round(stream.byte_rate),
        "untaken": stream.untaken,
        "kernel": stream.kernel_dropped,
        "lost": stream.lost,
        "losing": _round(stream.lost_rate),
        "causes": stream.causes,
        "takers": len(stream.takers),
        "exporters": stream.exporters,
        "workers": [{"name": each.name, "rate": _round(each.rate)} for each in stream.workers],
    }


def show_collector(collector: Collector, clock: float) -> View:
    """Return a collector's row."""
    client = collector.client
    since = None if collector.since is None else collector.since + clock
    if client.withheld:
        since = client.withheld.since
    return {
        "name": client.name,
        "generation": client.generation,
        "address": client.address,
        "port": client.port,
        "source": client.source,
        "streams": client.streams,
        "from": client.prefixes,
        "sample": client.sample,
        "group": client.group[:8],
        "health": collector.health,
        "since": None if since is None else round(since, 1),
        "sender": collector.sender,
        "sent": collector.sent,
        "rate": _round(collector.rate),
        "bytes": _round(collector.byte_rate),
        "expected": collector.expected,
        "kept_back": collector.kept_back,
        "withheld": collector.withheld,
        "by_kernel": collector.by_kernel,
        "templates": collector.templates,
        "order": client.withheld,
        "held": collector.held,
        "lost": collector.lost,
        "losing": _round(collector.lost_rate),
        "recent": collector.recent,
        "causes": collector.causes,
        "owed": [
            {
                "stream": each.stream,
                "datagrams": each.datagrams,
                "since": round(each.since, 1),
                "level_in": _round(each.level_in),
            }
            for each in collector.owed
        ],
    }


def show_exporter(exporter: Exporter) -> View:
    """Return an exporter's row."""
    return {
        "name": exporter.address,
        "rate": _round(exporter.rate),
        "bytes": _round(exporter.byte_rate),
        "share": round(exporter.share, 4),
        "streams": exporter.streams,
        "workers": exporter.workers,
        "takers": exporter.takers,
        "missed": exporter.missed,
    }


def flow(picture: Picture) -> View:
    """Return nodes and links of the diagram: exporters, streams, collectors, and what leaves between them.

    A collector that takes several streams has of each the part that the stream has of them all.
    """
    # The busiest, in an order that stays.
    streams = sorted(picture.streams, key=lambda each: -(each.rate or 0))[:FLOW_STREAMS]
    streams.sort(key=lambda each: each.name)
    rates = {each.name: each.rate or 0.0 for each in streams}
    most = sorted((picture.exporters or ())[:FLOW_EXPORTERS], key=lambda each: pack_address(each.address))
    links: list[View] = []
    nodes = []
    for exporter in most:
        nodes.append({"name": exporter.address, "rate": _round(exporter.rate)})
        links += [
            {"from": exporter.address, "to": stream, "rate": _round(rate)}
            for stream, rate in exporter.by_stream.items()
            if stream in rates
        ]
    rest = {
        stream: rate - sum(exporter.by_stream.get(stream, 0.0) for exporter in most) for stream, rate in rates.items()
    }
    others = {stream: rate for stream, rate in rest.items() if rate > 0.02 * rates[stream] and rate > 0.05}
    if others:
        nodes.append({"name": None, "rate": _round(sum(others.values()))})
        links += [{"from": None, "to": stream, "rate": _round(rate)} for stream, rate in others.items()]
    takers = sorted(
        picture.collectors or (),
        key=lambda each: (each.health in NO_TROUBLE, -(each.rate or 0), each.client.name),
    )
    shown, more = takers[:FLOW_COLLECTORS], takers[FLOW_COLLECTORS:]
    shown.sort(key=lambda each: (each.health in NO_TROUBLE, each.client.name))
    ends: list[View] = []
    copies: list[View] = []
    for collector in shown:
        ends.append(_end(collector.client.name, collector.health, [collector]))
        copies += _copies(collector.client.name, [collector], rates)
    if more:
        troubled = all(each.health not in NO_TROUBLE for each in more)
        ends.append(_end(None, "waiting" if troubled else "ok", more) | {"count": len(more)})
        copies += _copies(None, more, rates)
    return {
        "exporters": nodes,
        "streams": [
            {
                "name": each.name,
                "rate": _round(each.rate),
                "losing": _round(each.lost_rate),
                "causes": sorted(each.causes, key=lambda cause: -each.causes[cause])[:3],
                "takers": len(each.takers),
            }
            for each in streams
        ],
        "collectors": ends,
        "links": links,
        "copies": copies,
    }


def _end(name: str | None, health: str, collectors: Sequence[Collector]) -> View:
    losing = _sum(each.lost_rate for each in collectors)
    causes: dict[str, int] = {}
    for each in collectors:
        for cause, count in each.causes.items():
            causes[cause] = causes.get(cause, 0) + count
    most = sorted(causes, key=lambda cause: -causes[cause])[:3]
    return {
        "name": name,
        "health": health,
        "rate": _sum(each.rate for each in collectors),
        "losing": losing,
        "causes": most,
        "kinds": [kind_of(cause) for cause in most],
    }


def _copies(name: str | None, collectors: Iterable[Collector], rates: Mapping[str, float]) -> list[View]:
    parts: dict[str, float] = {}
    for each in collectors:
        wanted = {stream: rate for stream, rate in rates.items() if each.client.wants(stream)}
        whole = sum(wanted.values())
        total = (each.rate or 0.0) + (each.lost_rate or 0.0)
        for stream, rate in wanted.items():
            parts[stream] = parts.get(stream, 0.0) + (total * rate / whole if whole else 0.0)
    return [{"from": stream, "to": name, "rate": _round(rate)} for stream, rate in parts.items()]


def _sum(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return _round(sum(known)) if known else None


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, 1 if value < 1000 else None)
