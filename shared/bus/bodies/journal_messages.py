"""Messages by which a sender of copies reads a stream's past from the journal, a portion at a time.

The reader asks with a `JournalRead` on `JOURNAL_TOPIC`. On the topic that it chose there come the batches, each a
`Replayed` with the numbers that its worker gave it, and a `JournalPortion` behind them. No more
comes until the reader asks again, so it sets the pace. The journal keeps nothing of a reader: a journal that was
restarted goes on where the reader is.
"""

from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from shared.bus.bodies.fields import Number, ReplayTopic, SenderName, StreamName
from shared.client import Place, Source

JOURNAL_TOPIC: Final = "journal/"
MAX_WORKERS: Final = 1024
"""Workers in a request, each with its position."""
CATCH_UP_PREFIX: Final = "catchup/"
MAX_BEHIND: Final = 64
"""Collectors in one report of those that catch up, or have left."""
MAX_PORTION_ROWS: Final = 1 << 16
MAX_PORTION_PAYLOAD: Final = 8 * 1024 * 1024
"""The most of a stream in one portion: some milliseconds of the journal's time."""


class WorkerPosition(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """The place that a reader has reached in what a worker published on a stream since its boot.

    `sequence` and `total` are those that the worker's next message has if nothing is missing; a `total` that stands
    within a message brings that one again. `received_ns` is that of the last batch before it: it tells whether another
    boot of the worker comes before or behind this one.
    """

    worker: SenderName
    boot: Number
    sequence: Number
    total: Number
    received_ns: Number = 0


class JournalPlace(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """The place of a batch in the journal's files: the number of its segment, and the byte at which it begins.

    `began_ns` is the time in the segment's name: numbers are given again where the newest segments were removed while
    no journal ran. 0: it is not told.
    """

    segment: Number
    offset: Number
    began_ns: Number = 0


class JournalRead(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Asks for the next batches of a stream, in the order in which the journal took them.

    Of a worker in `positions` the batches from there on, of any other those that were received at `since_ns` or later.
    `place` is that of the portion before, and spares a search; a place that is gone does no harm. The portion holds
    at least one batch, if there is one, and ends before it has over `rows` datagrams or `payload` bytes. With `joined`
    small batches of a worker that follow each other come as one, under the numbers that `Replayed` tells.
    """

    id: Number
    reply: ReplayTopic
    stream: StreamName
    since_ns: Number
    positions: Annotated[list[WorkerPosition], Meta(max_length=MAX_WORKERS)]
    rows: Annotated[int, Meta(ge=1, le=MAX_PORTION_ROWS)] = 8192
    payload: Annotated[int, Meta(ge=1, le=MAX_PORTION_PAYLOAD)] = 2 * 1024 * 1024
    place: JournalPlace | None = None
    joined: bool = False


class Replayed(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """A batch out of the journal, with the numbers of the message by which its worker had published it.

    `read` is the id of the `JournalRead` that it answers. Where several were joined, `sequence` is that of the last,
    `total` and `received_ns` are those of the first. The batch's arrays follow, its payloads end to end.
    """

    read: Number
    stream: StreamName
    received_ns: Number
    worker: SenderName
    boot: Number
    sequence: Number
    total: Number


class JournalPortion(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Ends the answer to a `JournalRead`: `batches` came before it; a reader that has fewer asks anew.

    `positions` are those of the request, moved on behind these batches, with those of workers that were not in it.
    `expired` and `missing` count the datagrams between the one and the other that the journal does not have: retention
    has removed them, or it never had them whole. `at_end`: there is no more now. `error` is a word of the JSON
    protocol, `unknown_stream` or `unavailable`; empty when there was none.
    """

    id: Number
    batches: Number
    positions: Annotated[list[WorkerPosition], Meta(max_length=2 * MAX_WORKERS)]
    place: JournalPlace | None
    at_end: bool
    expired: Number = 0
    missing: Number = 0
    error: str = ""
    message: str = ""


class Behind(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """A collector that is owed the past: one that has `left`, that is `catching_up`, or that is `level` since.

    It has had what is before its `places`, and of other workers what was received before `since_ns`. It is still to get
    `rows`, the next of them received `age_ms` ago, at `per_second` datagrams a second; as far as is known.
    """

    name: Annotated[str, Meta(min_length=1, max_length=255)]
    generation: Number
    state: Literal["left", "catching_up", "level"]
    since_ns: Number
    places: Annotated[list[Place], Meta(max_length=1024)]
    rows: Number = 0
    age_ms: Number = 0
    per_second: Number = 0


class CatchUpReport(msgspec.Struct, array_like=True, frozen=True):
    """Some of the collectors of a source that are owed the past; what is said of each stands for itself."""

    source: Source
    behind: Annotated[list[Behind], Meta(max_length=MAX_BEHIND)]


def catch_up_topic(source: Source) -> str:
    """The topic of the `CatchUpReport`s on a source's collectors; it begins with `CATCH_UP_PREFIX`."""
    return f"{CATCH_UP_PREFIX}{source}/"
