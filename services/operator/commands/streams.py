"""`fanwire streams`: every stream, its listeners, its rate and losses, and who takes it."""

import argparse
from collections.abc import Iterator, Mapping
from typing import Final

from services.operator.cli.arguments import Subparsers, add_command
from services.operator.cli.numbers import counted
from services.operator.cli.text_tables import Cell, print_table
from services.operator.client.picture_reader import picture_with_rates
from services.operator.client.running_streams import streams_of
from shared.monitoring.picture import Picture
from shared.process.lifecycle import OK
from shared.settings.entries import Stream
from shared.settings.model import Settings

COLUMNS: Final = ("stream", "listens on", "protocol", "exporters", "received", "per second", "lost", "taken by")
NAMED: Final = 3
"""Collectors of a stream that are named."""
UNKNOWN: Final = "unknown"


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    add_command(subparsers, "streams", run, "list the streams, their rates, and who takes them")


def run(_arguments: argparse.Namespace, settings: Settings) -> int:
    """Print the streams that run, or of the settings where no service tells; and those that collectors wait for."""
    streams = streams_of(settings)
    rows = list(_rows(picture_with_rates(settings), streams, settings))
    print_table(counted(len(rows), "stream"), COLUMNS, rows, ("received", "per second", "lost"))
    return OK


def _rows(picture: Picture, streams: Mapping[str, Stream], settings: Settings) -> Iterator[tuple[Cell, ...]]:
    seen = {stream.name: stream for stream in picture.streams}
    protocols = {stream.name: stream.protocol for stream in settings.streams}
    for name in [*streams, *(seen.keys() - streams.keys())]:
        stream, protocol = seen.get(name), protocols.get(name)
        listens = ", ".join(streams[name].listen) if name in streams else "no listener"
        if stream is None:
            yield name, listens, protocol, UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN, _takers(picture, ())
            continue
        rate = None if stream.rate is None else round(stream.rate)
        numbers = (
            UNKNOWN if number is None else number for number in (stream.exporters, stream.received, rate, stream.lost)
        )
        yield name, listens, protocol, *numbers, _takers(picture, stream.takers)


def _takers(picture: Picture, names: tuple[str, ...]) -> str:
    if picture.collectors is None:
        return UNKNOWN
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{', '.join(names[:NAMED])}{more}" or "nobody"
