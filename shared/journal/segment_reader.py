"""Reads a segment record by record, also while it is being written, and passes over what is damaged.

Each record tells its own size, so heads are read without the payloads between them. A head that stands where it should
is believed; its checksum is looked at when the record is read. Where none stands, the next record is found by its
magic, and must be whole.
"""

import errno
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from shared.capture.pcapng import BLOCK_HEAD, INTERFACE, SECTION, Destination
from shared.datagrams.batch import DatagramBatch
from shared.journal.reached import parse_reached
from shared.journal.records import (
    MAGIC,
    MAX_OPTION,
    Head,
    Reached,
    RecordError,
    first_block_size,
    parse_head,
    parse_option,
    read_batch,
    told_offset,
)
from shared.journal.segments import Segment

WINDOW: Final = 32 * 1024
"""Bytes read at a time while heads are looked at: those of many small records, or of a large one."""
SEARCHED: Final = 1 << 20
"""Bytes read at a time in search of a record."""
MAX_HEADER: Final = WINDOW
"""Bytes that the blocks before the first record take at most."""
DAMAGED: Final = frozenset({errno.EIO, errno.EBADMSG, errno.EUCLEAN})
"""Errors of a file that is damaged, in part or as a whole."""
UNREADABLE: Final = DAMAGED | {errno.EACCES, errno.EPERM}
"""Errors by which a file can't be opened, and others can."""
BLOCK: Final = 4096
"""Bytes that the kernel reads as one, or not at all."""


def open_segment(directory: Path, segment: Segment) -> "SegmentReader":
    """Open a segment of the stream in `directory`, under its other name if it was sealed in the meantime. OSError."""
    try:
        return SegmentReader(directory / segment.name, segment)
    except FileNotFoundError:
        if not segment.is_open:
            raise
    sealed = Segment(segment.stream, segment.number, segment.began_ns)
    return SegmentReader(directory / sealed.name, sealed)


class SegmentReader:
    """The records of a file. OSError when it can't be opened or read."""

    def __init__(self, path: Path, segment: Segment) -> None:
        self.segment = segment
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._window, self._window_at = b"", 0
        self.damaged = 0
        """Bytes passed over so far, because no whole record is in them."""
        self.end = 0
        """The byte behind the last record that was found."""
        self.found = 0
        """Records that were found."""

    @property
    def size(self) -> int:
        """Return the bytes that the file has now."""
        return os.fstat(self._descriptor).st_size

    def heads(self, offset: int = 0) -> Iterator[Head]:
        """Yield the records from `offset` on, at which one should begin; 0: from the first one.

        It ends behind the last whole record that there is now; what stands behind that is not in `damaged`.
        """
        size, last = self.size, None
        self.end = offset or self.header_size()
        while self.end < size:
            head = self._head_at(self.end, size)
            if head is None:
                # A size that is wrong has led astray, unless that record is whole.
                past = last.offset + last.option_at if last and not self._is_whole(last) else self.end
                head = self._search(past, size)
                if head is None:
                    return
                self.damaged += max(0, head.offset - self.end)
            last, self.end = head, head.end
            self.found += 1
            yield head

    def read(self, head: Head) -> tuple[DatagramBatch, Destination]:
        """Return a record's batch and its destination. RecordError when it is damaged: count it as `damaged`."""
        return read_batch(head, self._read(head.size, head.offset))

    def _is_whole(self, head: Head) -> bool:
        try:
            self.read(head)
        except RecordError:
            return False
        return True

    def header_size(self) -> int:
        """Return the bytes of the blocks before the first packet; 0 when they are damaged."""
        start, at = self._read(MAX_HEADER, 0), 0
        while at + 8 <= len(start):
            kind, size = struct.unpack_from("<II", start, at)
            if kind not in (SECTION, INTERFACE):
                return at
            if size < 12 or size > MAX_HEADER or start[at + size - 4 : at + size] != start[at + 4 : at + 8]:
                return 0  # each block tells its size at both ends
            at += size
        return at if at <= len(start) else 0

    def reached_before(self) -> dict[str, Reached] | None:
        """Return what each worker had reached when the segment began; None: its beginning does not tell."""
        start = self._read(MAX_HEADER, 0)
        return parse_reached(start[: int.from_bytes(start[4:8], "little")])

    def _head_at(self, offset: int, size: int) -> Head | None:
        try:
            block = self._bytes(offset, first_block_size(self._bytes(offset, BLOCK_HEAD)))
            head = parse_head(block, offset, self.segment.began_ns)
        except RecordError:
            return None
        return head if head.end <= size else None

    def _search(self, offset: int, size: int) -> Head | None:
        """Return the first whole record whose identity stands behind an offset."""
        at = offset
        while at < size:
            chunk = self._read(SEARCHED, at)
            found = chunk.find(MAGIC)
            if found < 0:
                at += max(1, len(chunk) - len(MAGIC) + 1)
                continue
            option = self._read(MAX_OPTION, at + found)
            try:
                option_at = told_offset(option)
                head = parse_option(option, option_at, at + found - option_at, self.segment.began_ns)
                if head.offset >= 0 and head.end <= size and self._is_whole(head):
                    return head
            except RecordError:
                pass
            at += found + 1
        return None

    def _bytes(self, offset: int, size: int) -> bytes:
        """Return the bytes there, fewer at the end of the file."""
        at = offset - self._window_at
        if not 0 <= at <= at + size <= len(self._window):
            self._window, self._window_at = self._read(max(size, WINDOW), offset), offset
            at = 0
        return self._window[at : at + size]

    def _read(self, size: int, offset: int) -> bytes:
        """Return the bytes there; zeros in place of each block that the disk can't read: damaged ones."""
        try:
            return os.pread(self._descriptor, size, offset)
        except OSError as error:
            if error.errno not in DAMAGED:
                raise
        end = min(offset + size, self.size)
        starts = [offset, *range(offset + BLOCK - offset % BLOCK, end, BLOCK)]
        return b"".join(map(self._read_block, starts, [*starts[1:], end]))

    def _read_block(self, start: int, end: int) -> bytes:
        try:
            return os.pread(self._descriptor, end - start, start)
        except OSError as error:
            if error.errno not in DAMAGED:
                raise
            return bytes(end - start)

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
