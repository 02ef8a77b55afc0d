"""Reads a stream's past out of its segments: from positions on, a portion at a time, or between two times."""

import errno
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Final

from shared.bus.bodies.journal_messages import MAX_PORTION_ROWS, JournalPlace, JournalRead, WorkerPosition
from shared.capture.pcapng import Destination
from shared.datagrams.batch import DatagramBatch
from shared.journal.records import Head, Identity, RecordError
from shared.journal.segment_reader import UNREADABLE, SegmentReader, open_segment
from shared.journal.segments import LATE_NS, Segment, first_for

MAX_PASSED: Final = 4096
"""Records that a portion passes over in search of the first one: some 20 ms. A further portion goes on from there."""

COMPRESSED: Final = "compressed"
"""The reason for which a segment can't be read that another program has compressed."""

Worker = tuple[str, int]
"""Name and boot id of a worker."""
Segments = Callable[[], Sequence[Segment]]
"""Returns the segments that a stream has now, in their order."""


@dataclass(slots=True)
class Portion:
    """Batches with their identities, and how to go on; fields as in `JournalPortion`."""

    batches: list[tuple[Identity, DatagramBatch]] = field(default_factory=list)
    positions: dict[Worker, WorkerPosition] = field(default_factory=dict)
    place: JournalPlace | None = None
    at_end: bool = False
    expired: int = 0
    missing: int = 0
    damaged: int = 0
    """Bytes in which there is no whole record."""
    unreadable: list[Segment] = field(default_factory=list)
    """Sealed segments in which there is none at all, and those that can't be opened."""


class _PortionReader:
    """Fills one portion."""

    def __init__(self, wanted: JournalRead, most_batches: int) -> None:
        self._wanted, self._most_batches = wanted, most_batches
        positions = {(each.worker, each.boot): each for each in wanted.positions}
        self.portion = Portion(positions=positions, place=wanted.place)
        self._newest: dict[str, int] = {}
        """By worker: the time of the last batch before its positions, of whatever boot."""
        for each in wanted.positions:
            self._newest[each.worker] = max(each.received_ns, self._newest.get(each.worker, 0))
        self._rows, self._payload, self._passed = wanted.rows, wanted.payload, 0
        self._met: set[str] = set()
        """Workers of which a batch was met."""
        self._from_the_first = False

    def read(self, directory: Path, segments: Segments) -> Portion:
        """Read from where the portion before has ended, or else from where the first batch may be."""
        some = segments()
        index, offset = self._start(some)
        for segment in some[index:]:
            try:
                reader = open_segment(directory, segment)
            except OSError as error:
                if error.errno in UNREADABLE and not segment.is_open:
                    self.portion.unreadable.append(segment)
                elif error.errno != errno.ENOENT:  # else retention was quicker
                    raise
                offset = 0
                continue
            with reader:
                full = self._read_segment(reader, offset)
                self.portion.damaged += reader.damaged
                if not (full or offset or segment.is_open or reader.found):
                    self.portion.unreadable.append(segment)
            if full:
                return self.portion
            offset = 0
        self.portion.at_end = True
        return self.portion

    def _start(self, some: Sequence[Segment]) -> tuple[int, int]:
        place = self._wanted.place
        if place is not None and _is_among(some, place):
            index = next(at for at, segment in enumerate(some) if segment.number >= place.segment)
            self._from_the_first = index == 0 and some[index].number > place.segment
            return index, place.offset if some[index].number == place.segment else 0
        since_ns = min([self._wanted.since_ns, *(each.received_ns for each in self._wanted.positions)])
        index = first_for(some, since_ns)
        self._from_the_first = index == 0
        return index, 0

    def _read_segment(self, reader: SegmentReader, offset: int) -> bool:
        """Read on in a segment; return whether the portion is full."""
        segment, end = reader.segment, 0
        for head in reader.heads(offset):
            if self._passed >= MAX_PASSED and not self.portion.batches:
                full = True
            elif full := self._is_wanted(head):
                full = not self._read_batch(reader, head)
            else:
                self._passed += 1
                self._met.add(head.identity.worker)
            if full:
                self.portion.place = JournalPlace(segment.number, head.offset, segment.began_ns)
                return True
            end = head.end
        if end:
            self.portion.place = JournalPlace(segment.number, end, segment.began_ns)
        return False

    def _is_wanted(self, head: Head) -> bool:
        identity = head.identity
        if position := self.portion.positions.get((identity.worker, identity.boot)):
            return identity.total + head.rows > position.total
        if (newest := self._newest.get(identity.worker)) is not None:
            return head.received_ns > newest
        return head.received_ns >= self._wanted.since_ns

    def _read_batch(self, reader: SegmentReader, head: Head) -> bool:
        """Add a batch to the portion, if it is not damaged; return False when there is no room for it."""
        some = self.portion.batches
        if len(some) >= self._most_batches or (some and head.rows > self._rows):
            return False
        try:
            batch, _ = reader.read(head)
        except RecordError:
            self.portion.damaged += head.size
            return True
        if self.portion.batches and len(batch.payload) > self._payload:
            return False
        identity, worker = head.identity, head.identity.worker
        self._note_gap(identity)
        self._met.add(worker)
        self.portion.positions[worker, identity.boot] = WorkerPosition(
            worker, identity.boot, identity.sequence + 1, identity.total + head.rows, head.received_ns
        )
        self._newest[worker] = max(head.received_ns, self._newest.get(worker, 0))
        self._rows, self._payload = self._rows - head.rows, self._payload - len(batch.payload)
        self.portion.batches.append((identity, batch))
        return True

    def _note_gap(self, identity: Identity) -> None:
        if identity.worker not in self._newest:
            return
        position = self.portion.positions.get((identity.worker, identity.boot))
        gap = max(0, identity.total - (position.total if position else 0))
        if self._from_the_first and identity.worker not in self._met:
            self.portion.expired += gap
        else:
            self.portion.missing += gap


def read_portion(
    directory: Path, segments: Segments, wanted: JournalRead, most_batches: int = MAX_PORTION_ROWS
) -> Portion:
    """Return the next batches that a `JournalRead` asks for; `directory` is the stream's. OSError of the kernel."""
    return _PortionReader(wanted, most_batches).read(directory, segments)


def _is_among(some: Sequence[Segment], place: JournalPlace) -> bool:
    """Return whether a place is in one of these segments, or was in one before them; else numbers have begun anew."""
    there = [each.began_ns for each in some if each.number == place.segment]
    known = not (there and place.began_ns) or place.began_ns in there
    return bool(some) and place.segment <= some[-1].number and known


@dataclass(slots=True)
class PastBatches:
    """The batches of a stream that were received in a span of time, the oldest segment first."""

    directory: Path
    segments: Sequence[Segment]
    since_ns: int
    until_ns: int
    damaged: int = 0
    """Bytes passed over so far."""
    gone: int = 0
    """Segments that were removed before they were read."""
    unread: Counter[str] = field(default_factory=Counter)
    """Segments that could not be read, or not to their end, by the error."""
    place: JournalPlace | None = None
    """Place of the batch that was yielded last; None before the first."""

    def batches(
        self, start: JournalPlace | None = None, last_ns: int = 0
    ) -> Iterator[tuple[DatagramBatch, Destination]]:
        """Yield batches with where they were sent to; from a place on, if one is given.

        `last_ns` is the time of the batch there: where numbers have begun anew, what was received later follows.
        """
        if start is not None and self.segments and not _is_among(self.segments, start):
            self.gone, start, self.since_ns = self.gone + 1, None, max(self.since_ns, last_ns + 1)
        some = self.segments[first_for(self.segments, self.since_ns) :]
        if start is not None:
            some = [segment for segment in some if segment.number >= start.segment]
            self.gone += some[0].number - start.segment if some else 0
        for segment, following in zip_longest(some, some[1:]):
            if following and following.began_ns < self.until_ns:
                self.gone += following.number - segment.number - 1
            later = segment.began_ns > self.until_ns + LATE_NS
            if later and following and following.began_ns >= segment.began_ns:  # else a clock was set back within it
                continue
            offset = start.offset if start is not None and segment.number == start.segment else 0
            if not segment.is_readable:
                self.unread["set aside" if segment.is_bad else COMPRESSED] += 1
                continue
            try:
                with open_segment(self.directory, segment) as reader:
                    yield from self._batches_of(reader, offset)
                    self.damaged += reader.damaged + (0 if segment.is_open else reader.size - reader.end)
            except FileNotFoundError:  # retention was quicker
                self.gone += 1
            except OSError as error:
                self.unread[error.strerror or str(error)] += 1

    def _batches_of(self, reader: SegmentReader, offset: int) -> Iterator[tuple[DatagramBatch, Destination]]:
        for head in reader.heads(offset):
            if not self.since_ns <= head.received_ns < self.until_ns:
                continue
            try:
                batch = reader.read(head)
            except RecordError:
                self.damaged += head.size
                continue
            self.place = JournalPlace(reader.segment.number, head.offset, reader.segment.began_ns)
            yield batch
