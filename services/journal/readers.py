"""Those who read in the journal by the bus: their requests wait in turn, and each gets one portion."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import inf
from typing import Final, Protocol

from services.journal.stream_journal import StreamJournal
from shared.bus.bodies.journal_messages import JournalPortion, JournalRead, Replayed
from shared.bus.messages import Body
from shared.datagrams.batch import DatagramBatch
from shared.datagrams.gathered import Gathered
from shared.datagrams.limits import MAX_PAYLOAD
from shared.journal.encoding import Numbered, cut
from shared.journal.reading import Portion, read_portion
from shared.log import get_logger

MAX_WAITING: Final = 64
"""Requests that may wait; each reader has one under way."""
WAITING_SECONDS: Final = 4.0
"""A request that has waited for so long is refused: its reader asks anew a second later, and takes no answer to it."""
MAX_BATCHES: Final = 64
"""Batches in a portion, whatever their size: fewer than a queue of the bus holds."""
JOINED_ROWS: Final = 256
JOINED_NS: Final = 100_000_000
"""The most that batches have together that are joined, and the time within which they were received: each message has
its cost, and the first one's time stands for all of them."""

LATELY_SECONDS: Final = 1.0
"""For so long after a request the next one is likely to come."""

log = get_logger()


class Publish(Protocol):
    """Puts a message on the bus; returns False when the queue is full."""

    def __call__(self, topic: str, body: Body, batch: DatagramBatch | None = None) -> bool:
        """Publish."""


class Readers:
    """Answers requests, one when its turn comes."""

    def __init__(
        self, publish: Publish, streams: Mapping[str, StreamJournal], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._publish, self._streams, self._clock = publish, streams, clock
        self._waiting: deque[tuple[float, JournalRead]] = deque()
        self._asked_at = -inf
        self.refused = 0
        """Requests that were answered with an error."""

    def __bool__(self) -> bool:
        return bool(self._waiting)

    @property
    def asked_lately(self) -> bool:
        """Return whether somebody reads: the next request may come at any time."""
        return self._clock() < self._asked_at + LATELY_SECONDS

    def add(self, request: JournalRead, *, memory_short: bool) -> None:
        """Let a request wait for its turn, or refuse it."""
        self._asked_at = self._clock()
        if len(self._waiting) >= MAX_WAITING or memory_short:
            why = "the journal's memory is short" if memory_short else f"{MAX_WAITING} requests wait already"
            self._refuse(request, "unavailable", f"{why}; ask again in a second")
        else:
            self._waiting.append((self._clock(), request))

    def answer(self) -> None:
        """Answer the request that has waited longest."""
        asked_at, request = self._waiting.popleft()
        if self._clock() >= asked_at + WAITING_SECONDS:
            self._refuse(request, "unavailable", "the journal is slow, and others were first; ask again in a second")
            return
        stream = self._streams.get(request.stream)
        if stream is None:
            self._refuse(request, "unknown_stream", f"the journal does not keep stream {request.stream}")
            return
        try:
            portion = read_portion(stream.directory, stream.segments, request, MAX_BATCHES)
        except OSError as error:
            stream.note_disk_error(error)
            self._refuse(request, "unavailable", f"the journal can't be read: {error.strerror}")
            return
        for segment in portion.unreadable:
            stream.set_aside(segment)
        if self._send(request, portion):
            stream.note_read(sum(len(batch) for _, batch in portion.batches), portion.damaged)

    def _send(self, request: JournalRead, portion: Portion) -> bool:
        """Send a portion; return False when the bus takes no more: the reader, which gets no end, asks anew."""
        batches = [part for each in portion.batches for part in cut(*each)]
        if request.joined:
            batches = [*join(batches)]
        for identity, batch in batches:
            numbers = identity.worker, identity.boot, identity.sequence, identity.total
            body = Replayed(request.id, request.stream, batch.received_ns, *numbers)
            if not self._publish(request.reply, body, batch):
                return False
        return self._publish(
            request.reply,
            JournalPortion(
                id=request.id,
                batches=len(batches),
                positions=list(portion.positions.values()),
                place=portion.place,
                at_end=portion.at_end,
                expired=portion.expired,
                missing=portion.missing,
            ),
        )

    def _refuse(self, request: JournalRead, error: str, message: str) -> None:
        self.refused += 1
        positions, place = request.positions, request.place
        body = JournalPortion(request.id, 0, positions, place, at_end=False, error=error, message=message)
        self._publish(request.reply, body)


def join(some: Iterable[Numbered]) -> Iterator[Numbered]:
    """Yield batches, as one where small ones of a worker follow each other: see `Replayed` for its numbers."""
    waiting: list[Numbered] = []
    rows = size = 0
    for identity, batch in some:
        if waiting:
            (first, oldest), (last, newest) = waiting[0], waiting[-1]
            follows = identity[:2] == first[:2] and identity.total == last.total + len(newest)
            recent = batch.received_ns - oldest.received_ns <= JOINED_NS
            fits = rows + len(batch) <= JOINED_ROWS and size + len(batch.payload) <= MAX_PAYLOAD
            if not (follows and recent and fits):
                yield _as_one(waiting)
                waiting, rows, size = [], 0, 0
        waiting.append((identity, batch))
        rows += len(batch)
        size += len(batch.payload)
    if waiting:
        yield _as_one(waiting)


def _as_one(some: Sequence[Numbered]) -> Numbered:
    (first, batch), (last, _) = some[0], some[-1]
    if len(some) == 1:
        return first, batch
    gathered = Gathered([each for _, each in some])
    payload = b"".join([each.payload for each in gathered.batches])
    return first._replace(sequence=last.sequence), replace(batch, rows=gathered.rows, payload=payload)
