"""The journal of one stream: the segment that is written, those that are there, and what became of each datagram."""

import contextlib
import errno
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

from services.journal import disk_thread
from services.journal.disk_thread import DiskThread
from shared.capture.pcapng import Destination
from shared.datagrams.batch import DatagramBatch
from shared.datagrams.limits import MAX_PAYLOAD
from shared.journal.directory import DIRECTORY_MODE, find_reached, recover, segments_in, set_aside
from shared.journal.encoding import Numbered
from shared.journal.records import Identity, Reached
from shared.journal.retention import Kept
from shared.journal.segment_writer import SegmentWriter
from shared.journal.segments import LASTING_NS, SECOND, Segment
from shared.ledger.counters import (
    CUT_BYTES,
    DAMAGED_BYTES,
    DISK_ERROR,
    DISK_FULL,
    EXPIRED,
    KEPT_BYTES,
    NEWEST,
    OLDEST,
    READ,
    SEGMENTS,
    SET_ASIDE,
    TAKEN,
    WRITE_ERRNO,
    WRITTEN,
)
from shared.log import get_logger

SEGMENT_BYTES: Final = 128 * 1024 * 1024
SEGMENT_SECONDS: Final = LASTING_NS / SECOND
"""A segment is sealed at this size or age: what retention removes at once, and the error of a search by time."""
RETRY_SECONDS: Final = 1.0
"""After an error of the disk nothing is written for this long: a disk that fails would hold up the loop each time."""
GATHERED_ROWS: Final = 4096
GATHERED_BYTES: Final = 4 * MAX_PAYLOAD
"""Batches with as much are written without waiting for more: these would cost hardly less together."""
NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT})

log = get_logger()


class StreamJournal:
    """Appends a stream's batches to segments below `directory`, which this process has locked."""

    def __init__(self, stream: str, directory: Path, most_bytes: int, disk: DiskThread) -> None:
        self.stream = stream
        self.destination = Destination()
        """The destination in the headers of what is written."""
        self.directory = directory / stream
        self.account: Counter[str] = Counter()
        self.reached: dict[str, Reached] = {}
        """By worker: what it has reached with its last batch here."""
        self._segment_bytes = min(SEGMENT_BYTES, most_bytes // 8)
        self._gathered_bytes = min(GATHERED_BYTES, self._segment_bytes // 8)
        self._waiting: list[Numbered] = []
        self._waiting_rows = self._waiting_bytes = 0
        self._disk = disk
        self._kept: dict[int, Kept] = {}
        """Segments that are there, by number, without the one that is written now."""
        self._sealing: set[int] = set()
        """Those of them that are just being sealed once more."""
        self._rows: dict[int, int] = {}
        """Datagrams of those that this process has written."""
        self._writer: SegmentWriter | None = None
        self._written_ns = self._newest_ns = 0
        self._seal_at = self._retry_at = 0.0
        self._failing: str | None = None
        self._unwritten = 0
        """Datagrams dropped since writing began to fail."""
        self._next_number = 1
        self._looked_ns = -1
        """The last change of the directory behind which segments were looked for."""
        self.unsynced = False
        self.going = 0
        """Bytes of segments that the disk's thread has still to remove."""

    def open(self) -> None:
        """Seal what the last journal has left open, and learn what is there, and what workers have reached."""
        known: dict[int, dict[str, Reached]] = {}
        self.directory.mkdir(DIRECTORY_MODE, parents=True, exist_ok=True)
        for each in recover(self.directory.parent, self.stream):
            known[each.left.number] = each.reached
            self.account[CUT_BYTES] += each.cut if each.now and not each.now.is_bad else 0
            if each.now and each.now.is_bad:
                self._note_bad(each.now)
            elif each.cut:
                log.warning(
                    "a segment was not whole: its end was cut off", segment=each.left.name, stream=self.stream,
                    cut_bytes=each.cut,
                )  # fmt: skip
        there: dict[str, os.stat_result] = {}
        for file in os.scandir(self.directory):
            with contextlib.suppress(FileNotFoundError):
                there[file.name] = _stat(file)
        for segment in segments_in(self.directory.parent, self.stream, unreadable=True):
            if found := [there[name] for name in there.keys() & segment.names]:  # two: compressed, and left there
                size, ended_ns = sum(each.st_size for each in found), max(each.st_mtime_ns for each in found)
                self._kept[segment.number] = Kept(segment, size, ended_ns)
        self._next_number = max(self._kept, default=0) + 1
        if (newest := self._kept.get(self._next_number - 1)) and newest.segment.packed:
            log.warning(
                "the newest segment is compressed: the journal does not know what it has of it, and keeps some of it "
                "once more, or counts it as unserved", segment=newest.segment.name, stream=self.stream,
                cure="compress none of the last minutes while the journal is stopped",
            )  # fmt: skip
        self.reached = find_reached(self.directory.parent, self.stream, known)

    def _note_bad(self, segment: Segment) -> None:
        self.account[SET_ASIDE] += 1
        log.error("nothing can be read in a segment: it is set aside", segment=segment.name, stream=self.stream)

    def append(self, identity: Identity, batch: DatagramBatch) -> None:
        """Take a batch; it is written with those that come before the next `write`, or once these are many."""
        self.account[TAKEN] += len(batch)
        self._waiting.append((identity, batch))
        self._waiting_rows += len(batch)
        self._waiting_bytes += len(batch.payload)
        if self._waiting_rows >= GATHERED_ROWS or self._waiting_bytes >= self._gathered_bytes:
            self.write()

    def write(self) -> None:
        """Write what waits; where that fails, count it and go on."""
        if self._waiting:
            waiting, self._waiting, self._waiting_rows, self._waiting_bytes = self._waiting, [], 0, 0
            self._write(waiting)

    def _write(self, some: Sequence[Numbered]) -> None:
        rows = sum([len(batch) for _, batch in some])
        if self._failing and time.monotonic() < self._retry_at:
            self._drop(self._failing, rows)
            return
        try:
            writer = self._writer or self._begin(some[0][1].received_ns)
            writer.append(some)
        except OSError as error:
            if len(some) > 1:  # there may be room for some of them
                for each in some:
                    self._write([each])
                return
            self._fail(error)
            self._drop(self._failing or DISK_ERROR, rows)
            return
        if self._failing:
            self._recovered()
        self.account[WRITTEN] += rows
        for identity, batch in some:
            self.reached[identity.worker] = Reached(identity.boot, identity.total + len(batch))
        self._written_ns, self._newest_ns, self.unsynced = time.time_ns(), some[-1][1].received_ns, True
        if writer.size >= self._segment_bytes:
            self.seal()

    def _begin(self, received_ns: int) -> SegmentWriter:
        """Begin the next segment."""
        segment = Segment(self.stream, self._next_number, received_ns, is_open=True)
        try:
            self._writer = SegmentWriter(self.directory, segment, self.destination, self.reached)
        except FileNotFoundError:  # another program has removed the directory
            self.directory.mkdir(DIRECTORY_MODE, parents=True, exist_ok=True)
            self._writer = SegmentWriter(self.directory, segment, self.destination, self.reached)
        self._next_number += 1
        self._seal_at = time.monotonic() + SEGMENT_SECONDS
        return self._writer

    def _drop(self, cause: str, rows: int) -> None:
        self.account[cause] += rows
        self._unwritten += rows

    def _fail(self, error: OSError) -> None:
        self._retry_at = time.monotonic() + RETRY_SECONDS
        self._failing = DISK_FULL if error.errno in NO_ROOM else DISK_ERROR
        self.account[WRITE_ERRNO] = error.errno or errno.EIO
        cure = "free some of the disk, or lower [journal] bytes" if self._failing == DISK_FULL else "look at the disk"
        log.error(
            "the journal can't write: datagrams come to collectors as ever, and are not kept", error=error.strerror,
            of=self.stream, directory=str(self.directory), cure=cure,
        )  # fmt: skip
        if self._writer and self._writer.empty:
            self._take_back(self._writer)
        self.seal()  # retention removes only what is sealed

    def _take_back(self, writer: SegmentWriter) -> None:
        """Remove a segment that nothing could be written to; the next one gets its number, so that none is missing."""
        self._writer = None
        with contextlib.suppress(OSError):  # then it stays until the next start
            writer.remove()
            self._next_number -= 1

    def _recovered(self) -> None:
        self._failing = None
        self.account[WRITE_ERRNO] = 0
        log.info("the journal writes again", stream=self.stream, not_kept=self._unwritten)
        self._unwritten = 0

    def keep_up(self) -> None:
        """Seal the segment that is written once it is old enough, and what could not be sealed; look for changes.

        Due each second.
        """
        for number, each in self._kept.items():
            left_open = each.segment.is_open and each.segment.is_readable and not each.busy
            if left_open and number not in self._sealing:
                self._seal_again(number, each.segment)
        if self._writer and time.monotonic() >= self._seal_at:
            self.seal()
        if (changed_ns := disk_thread.changed_ns(self.directory)) != self._looked_ns:
            self._looked_ns = changed_ns
            self._look()

    def _look(self) -> None:
        """Let the disk's thread find out which segments another program has removed, or compressed."""
        writer = self._writer
        some = [each for each in self._kept.values() if not each.busy]
        if writer:
            some.append(Kept(writer.segment, writer.size, self._written_ns))

        def apply(result: list[tuple[Kept, Kept | None]] | OSError) -> None:
            if isinstance(result, OSError):
                self.note_disk_error(result)
                return
            for before, now in result:
                number = before.segment.number
                if writer and self._writer is writer and writer.segment is before.segment:
                    self.seal()  # so its datagrams are counted, and the next ones are kept
                elif self._kept.get(number) is before:  # else something was done with it meanwhile
                    if now:
                        self._kept[number] = now
                    else:
                        self._forget(number)

        self._in_thread(lambda: disk_thread.find_changed(self.directory, some), apply)

    def _forget(self, number: int) -> None:
        """Count what was in a segment that another program has removed."""
        del self._kept[number]
        self.account[EXPIRED] += self._rows.pop(number, 0)

    def seal(self) -> None:
        """Write no more to the present segment; the disk's thread seals it."""
        writer, self._writer = self._writer, None
        if writer is None:
            return
        number = writer.segment.number
        self._kept[number] = Kept(writer.segment, writer.size, self._written_ns, busy=True)
        self._rows[number] = writer.rows
        self._in_thread(lambda: disk_thread.seal(writer), partial(self._note_sealed, number))

    def _seal_again(self, number: int, segment: Segment) -> None:
        """Seal a segment for which that has failed; until then retention may remove it."""
        self._sealing.add(number)
        self._in_thread(lambda: disk_thread.seal_again(self.directory, segment), partial(self._note_sealed, number))

    def _note_sealed(self, number: int, result: Segment | OSError) -> None:
        self._sealing.discard(number)
        if number not in self._kept:  # retention has removed it
            return
        if isinstance(result, FileNotFoundError):
            self._forget(number)
        elif isinstance(result, Segment):
            self._kept[number] = replace(self._kept[number], segment=result, busy=False)
        else:
            self._kept[number] = replace(self._kept[number], busy=False)
            self.note_disk_error(result)

    def writers(self) -> list[SegmentWriter]:
        """Return what is to be synced, and consider it done."""
        self.unsynced = False
        return [self._writer] if self._writer else []

    def note_disk_error(self, error: OSError) -> None:
        """Report an error of the disk by which nothing is known to be lost."""
        log.error("the journal's disk fails", error=error.strerror, of=self.stream, directory=str(self.directory))

    def kept(self) -> list[Kept]:
        """Return the segments that are there, the one that is written among them."""
        writer = self._writer
        return [
            *self._kept.values(),
            *([Kept(writer.segment, writer.size, self._written_ns, busy=True)] if writer else []),
        ]

    def segments(self) -> list[Segment]:
        """Return the segments that can be read, in their order."""
        readable = [each.segment for each in self.kept() if each.segment.is_readable]
        return sorted(readable, key=lambda segment: segment.number)

    def remove(self, going: Kept) -> None:
        """Let the disk's thread remove a segment, and count what was in it."""
        number = going.segment.number
        del self._kept[number]
        self.going += going.size
        known = self._rows.pop(number, None)

        def apply(result: tuple[int, OSError | None]) -> None:
            rows, error = result
            self.going -= going.size
            if error is None:
                self.account[EXPIRED] += rows
            else:
                self._kept[number] = replace(going, stuck=True)
                self.note_disk_error(error)

        self._in_thread(lambda: disk_thread.remove(self.directory, going.segment, known), apply)

    def note_read(self, rows: int, damaged: int) -> None:
        """Count what readers got, and the damaged bytes that were passed over for it."""
        self.account[READ] += rows
        if damaged:
            self.account[DAMAGED_BYTES] += damaged
            log.warning("a part of the journal is damaged: it was passed over", of=self.stream, damaged_bytes=damaged)

    def set_aside(self, segment: Segment) -> None:
        """Set a sealed segment aside in which no record can be read."""
        try:
            bad = set_aside(self.directory, segment)
        except OSError as error:
            self.note_disk_error(error)
            return
        self._kept[segment.number] = replace(self._kept[segment.number], segment=bad)
        self._note_bad(bad)

    def report(self) -> Mapping[str, int]:
        """Return the account, with gauges of what is there."""
        kept = self.kept()
        oldest = min((each.segment.began_ns for each in kept if each.segment.is_readable), default=0)
        size = sum(each.size for each in kept)
        gauges = {SEGMENTS: len(kept), KEPT_BYTES: size, OLDEST: oldest, NEWEST: self._newest_ns}
        return {**self.account, **gauges}

    def _in_thread(self, job: Callable[[], disk_thread.R], apply: Callable[[disk_thread.R], None]) -> None:
        def work() -> Callable[[], None]:
            result = job()
            return lambda: apply(result)

        self._disk.submit(work)


def _stat(file: os.DirEntry[str]) -> os.stat_result:
    """Return what is known of a file, or of a symbolic link that leads nowhere. FileNotFoundError: it is gone."""
    try:
        return file.stat()
    except OSError:
        return file.stat(follow_symlinks=False)
