"""The past of a stream as the commands read it: from the journal's files, whether a journal runs or not."""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

import numpy as np

from services.operator.cli.arguments import prefix
from services.operator.cli.output import say
from services.operator.cli.times import FORMS, parse_time
from shared.bus.bodies.journal_messages import JournalPlace
from shared.capture.pcapng import Destination
from shared.datagrams.batch import DatagramBatch, Indices
from shared.datagrams.prefix_set import Prefixes, halves_of
from shared.journal.directory import segments_in, streams_in
from shared.journal.reading import COMPRESSED, PastBatches
from shared.journal.segments import SECOND
from shared.process.lifecycle import CANT_CREATE, USAGE, OperatorError, Parser
from shared.settings.explain import did_you_mean
from shared.settings.model import Settings
from shared.settings.tables import Journal

INSTALLED: Final = Path("/var/lib/fanwire/journal")
"""The directory of a journal that systemd runs, which alone has STATE_DIRECTORY."""
CURES: Final = {COMPRESSED: "; decompress them first, such as by `zstd -d`"}
"""Advice about segments that can't be read, by the reason."""


def add_past_arguments(parser: Parser) -> None:
    """Add the options that say which part of which stream's past is wanted."""
    parser.add_argument("--stream", required=True, metavar="STREAM", help="a stream that the journal keeps")
    parser.add_argument("--from", dest="since", default="", metavar="TIME", help="default: all that there is")
    parser.add_argument("--until", default="now", metavar="TIME", help=f"TIME is such as {FORMS}; default: now")
    parser.add_argument("--source", type=prefix, metavar="CIDR", help="only datagrams of these exporters")
    parser.add_argument("--directory", type=Path, metavar="DIR", help="the journal's; default: as in settings")


@dataclass(slots=True)
class Wanted:
    """A part of the past: batches between two times, and of their rows those of some exporters."""

    past: PastBatches
    prefixes: Prefixes | None
    began_ns: int
    """The time at which it begins, or at which there is something."""

    def batches(
        self, start: JournalPlace | None = None, last_ns: int = 0
    ) -> Iterator[tuple[DatagramBatch, Indices, Destination]]:
        """Yield batches with the rows that are wanted, and with the destination of their datagrams."""
        for batch, destination in self.past.batches(start, last_ns):
            if self.prefixes is None:
                rows = np.arange(len(batch))
            else:
                rows = np.flatnonzero(self.prefixes.match(halves_of(batch)))
            if len(rows):
                yield batch, rows, destination

    def share_done(self, received_ns: int) -> float:
        """Return which share of the time is behind a batch received then, from 0 to 1."""
        whole = max(1, min(self.past.until_ns, _now_ns()) - self.began_ns)
        return min(1.0, max(0.0, (received_ns - self.began_ns) / whole))


def _now_ns() -> int:
    return int(datetime.now().timestamp() * SECOND)


def find_past(arguments: argparse.Namespace, settings: Settings) -> Wanted:
    """Return the part of the past that is asked for. OperatorError (64, 73) where there is no such stream or time."""
    now = datetime.now().astimezone()
    since_ns = _parse("--from", arguments.since, now) if arguments.since else 0
    until_ns = _parse("--until", arguments.until, now)
    if since_ns >= until_ns:
        raise OperatorError(USAGE, "--from has to be before --until")
    directory = arguments.directory or _directory(settings)
    try:
        streams = streams_in(directory)
        segments = [] if "/" in arguments.stream else segments_in(directory, arguments.stream, unreadable=True)
    except OSError as error:
        cure = "name it by --directory, and be its user or root"
        raise OperatorError(CANT_CREATE, f"no journal at {directory}: {error.strerror}; {cure}") from None
    if not segments:
        nearest = did_you_mean(arguments.stream, streams)
        there = f"it keeps: {', '.join(streams)}" if streams else "it keeps nothing yet"
        raise OperatorError(USAGE, f"the journal has nothing of {arguments.stream!r}{nearest}; {there}")
    past = PastBatches(directory / arguments.stream, segments, since_ns, until_ns)
    first_ns = min(segment.began_ns for segment in segments)
    if since_ns and since_ns < first_ns and until_ns > first_ns:
        say(f"the journal begins at {shown(first_ns)}: there is nothing of {arguments.stream} before")
    return Wanted(past, Prefixes([arguments.source]) if arguments.source else None, max(since_ns, first_ns))


def _parse(option: str, text: str, now: datetime) -> int:
    try:
        return int(parse_time(text, now).timestamp() * 1_000_000) * 1000
    except (ValueError, OverflowError) as error:
        raise OperatorError(USAGE, f"{option}: {error}") from None


def _directory(settings: Settings) -> Path:
    own = settings.journal
    if own.directory == Journal().directory and not own.path.is_dir() and INSTALLED.is_dir():
        return INSTALLED
    return own.path


def shown(at_ns: int) -> str:
    """Return a time as people read it, in this host's zone."""
    return f"{datetime.fromtimestamp(at_ns / SECOND):%F %T}"


def tell_losses(wanted: Wanted) -> bool:
    """Say what could not be read; return whether there was such a thing."""
    if wanted.past.damaged:
        say(f"{wanted.past.damaged} bytes of the journal are damaged: what was in them is left out")
    if wanted.past.gone:
        say(f"segments that were removed before they were read: {wanted.past.gone}; they are left out")
    for error, number in wanted.past.unread.items():
        say(f"segments that can't be read: {number} ({error}); they are left out{CURES.get(error, '')}")
    return wanted.past.damaged + wanted.past.gone + wanted.past.unread.total() > 0
