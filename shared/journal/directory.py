"""The journal's directory: one for each stream in it, with that stream's segments. One journal at a time writes there.

A start reads the names of all segments, and of those that a journal left open the end: what is not whole is cut off.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from shared.journal.records import Reached, RecordError
from shared.journal.segment_reader import UNREADABLE, SegmentReader
from shared.journal.segment_writer import seal_left, sync_directory
from shared.journal.segments import Segment, parse_name
from shared.process.file_locks import lock_at_once
from shared.settings.values import Name

DIRECTORY_MODE: Final = 0o750
CHECKED: Final = 32 * 1024 * 1024
"""Bytes at the end of a segment left open whose checksums are looked at. What stands before was on the disk long ago;
should it be damaged, readers find out."""

MOST_LOOKED_AT: Final = 4
"""Segments that are read for the workers in them, the newest first, until one tells what all had reached before it."""


@dataclass(slots=True)
class Recovered:
    """A segment that was left open: what it is now, None for one without a whole record, and what was cut off."""

    left: Segment
    now: Segment | None
    cut: int
    reached: dict[str, Reached]
    """By worker: what it has reached with its last batch here."""


class Lock:
    """The right to write in the directory, made if it is not there. BlockingIOError when another journal has it."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._descriptor = _lock(directory)

    def hold(self) -> None:
        """Lock the directory that is there now, where another program has removed or moved the one that was locked.

        Due each second. Errors as at first: then the lock is on the old one.
        """
        with suppress(FileNotFoundError):
            if os.path.samestat(self._directory.stat(), os.fstat(self._descriptor)):
                return
        fresh = _lock(self._directory)
        self.close()
        self._descriptor = fresh

    def close(self) -> None:
        """Give it back."""
        os.close(self._descriptor)


def _lock(directory: Path) -> int:
    """Return a descriptor that has the lock."""
    directory.mkdir(DIRECTORY_MODE, parents=True, exist_ok=True)
    return lock_at_once(os.open(directory, os.O_RDONLY | os.O_DIRECTORY))


def streams_in(directory: Path) -> list[str]:
    """Return the streams of which there are segments. OSError when the directory can't be read.

    Other directories are passed over, such as `lost+found`: those where this user may not look, or with names that no
    stream has.
    """
    found = []
    for path in directory.iterdir():
        with suppress(OSError, msgspec.ValidationError):
            found += [path.name] if segments_in(directory, msgspec.convert(path.name, Name), unreadable=True) else []
    return sorted(found)


def segments_in(directory: Path, stream: str, *, unreadable: bool = False) -> list[Segment]:
    """Return the segments of a stream in their order; those set aside or compressed only if wanted.

    OSError of the kernel.
    """
    try:
        names = [each.name for each in (directory / stream).iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = [segment for name in names if (segment := parse_name(stream, name)) and (unreadable or segment.is_readable)]
    found.sort(key=lambda segment: (segment.number, segment.is_readable))
    return list({(each.number, each.began_ns): each for each in found}.values())  # one that is there compressed, too


def find_reached(directory: Path, stream: str, known: Mapping[int, Mapping[str, Reached]]) -> dict[str, Reached]:
    """Return what each worker has reached with the batches that are there of a stream.

    The newest segment tells it, unless its beginning is damaged; then those before it do. By number, `known` has what
    was read of some segments already. Those of another stream, whose directory had this name given, tell nothing.
    """
    found: dict[str, Reached] = {}
    for segment in reversed(segments_in(directory, stream)[-MOST_LOOKED_AT:]):
        with suppress(OSError), SegmentReader(directory / stream / segment.name, segment) as reader:
            heads = (head for head in reader.heads() if head.stream == stream)
            own = known.get(segment.number) or {head.identity.worker: head.reached for head in heads}
            found = {**own, **found}
            if own and (before := reader.reached_before()) is not None:
                return before | found
    return found


def recover(directory: Path, stream: str) -> Iterator[Recovered]:
    """Seal what a journal has left open in a stream's directory; one without a whole record is set aside, or removed.

    OSError of the kernel. Nobody else may write there.
    """
    for segment in segments_in(directory, stream):
        if segment.is_open:
            try:
                yield _recover(directory / stream, segment)
            except OSError as error:
                if error.errno not in UNREADABLE:
                    raise
                yield Recovered(segment, set_aside(directory / stream, segment), 0, {})


def _recover(directory: Path, segment: Segment) -> Recovered:
    path, reached = directory / segment.name, dict[str, Reached]()
    with SegmentReader(path, segment) as reader:
        size, start, end = reader.size, reader.header_size(), 0
        for head in reader.heads():
            try:
                if head.offset >= size - CHECKED:
                    reader.read(head)
            except RecordError:
                continue
            end = head.end
            if head.stream == segment.stream:
                reached[head.identity.worker] = head.reached
    if not end and size <= max(start, 1):  # nothing was in it
        path.unlink()
        sync_directory(directory)
        return Recovered(segment, None, 0, reached)
    if not end:
        return Recovered(segment, set_aside(directory, segment), size, reached)
    if end < size:
        os.truncate(path, end)
    return Recovered(segment, seal_left(directory, segment), size - end, reached)


def set_aside(directory: Path, segment: Segment) -> Segment:
    """Mark a segment as one that can't be read; return it as it is now. `directory` is the stream's."""
    bad = Segment(segment.stream, segment.number, segment.began_ns, segment.is_open, is_bad=True)
    (directory / segment.name).rename(directory / bad.name)
    sync_directory(directory)
    return bad
