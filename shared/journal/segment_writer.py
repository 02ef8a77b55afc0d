"""Writes a segment: record behind record, each whole or not there at all as far as a reader can tell."""

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Final

from shared.capture.pcapng import Destination, interface_block, section_block
from shared.journal.encoding import Numbered, Records
from shared.journal.reached import reached_option
from shared.journal.records import Reached
from shared.journal.segments import Segment

MODE: Final = 0o640


def header(stream: str, reached: Mapping[str, Reached] = MappingProxyType({})) -> bytes:
    """Return what a segment begins with: a section, which tells what workers have reached, and the stream."""
    return section_block("fanwire journal", reached_option(reached)) + interface_block(stream)


class SegmentWriter:
    """A segment that is being written. FileExistsError or another OSError when it can't be made.

    `directory` is the stream's. An OSError leaves what was written before it whole, and the next record may be tried.
    `reached` is what workers have reached before this segment.
    """

    def __init__(
        self,
        directory: Path,
        segment: Segment,
        destination: Destination,
        reached: Mapping[str, Reached] = MappingProxyType({}),
    ) -> None:
        self.segment = segment
        self.rows = 0
        self._named = False
        """True if its name is on the disk."""
        self._directory, self._destination = directory, destination
        self._path = directory / segment.name
        self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, MODE)
        self.size = 0
        """Bytes of whole records and what stands before them."""
        start = header(segment.stream, reached)
        try:
            if os.write(self._descriptor, start) < len(start):
                raise OSError(28, os.strerror(28), str(self._path))
        except OSError:
            os.close(self._descriptor)
            self._path.unlink()
            raise
        self.size = self._empty_size = len(start)

    @property
    def empty(self) -> bool:
        """Return whether there is no record in it."""
        return self.size == self._empty_size

    def append(self, some: Sequence[Numbered]) -> None:
        """Append batches, in one go. OSError: nothing was appended."""
        records = Records(some, self.segment.began_ns, self._destination)
        try:
            records.append_to(self._descriptor)
        except OSError:
            self._take_back()
            raise
        self.size += sum(records.sizes)
        self.rows += sum(len(batch) for _, batch in some)

    def _take_back(self) -> None:
        """Remove the part of a record that was written; where that fails, readers find no whole record in it."""
        with contextlib.suppress(OSError):
            os.ftruncate(self._descriptor, self.size)
        os.lseek(self._descriptor, self.size, os.SEEK_SET)

    def sync(self) -> None:
        """Bring what was appended to the disk (fdatasync(2)), and at first its name, too. OSError of the kernel.

        Another thread may do it, if it is the one that seals, too.
        """
        os.fdatasync(self._descriptor)
        if not self._named:
            sync_directory(self._directory)
            self._named = True

    def seal(self) -> Segment:
        """Bring all to the disk, close the file and give it its last name. OSError: it is closed, and named as before.

        One that is empty is to be removed instead.
        """
        try:
            os.fdatasync(self._descriptor)
        finally:
            os.close(self._descriptor)
        return seal_segment(self._directory, self.segment)

    def remove(self) -> None:
        """Close the file and remove it. OSError: it is closed, and still there."""
        os.close(self._descriptor)
        self._path.unlink()


def seal_segment(directory: Path, segment: Segment) -> Segment:
    """Give a segment that is written no more its last name; return it as it is now."""
    sealed = Segment(segment.stream, segment.number, segment.began_ns)
    (directory / segment.name).rename(directory / sealed.name)
    sync_directory(directory)
    return sealed


def seal_left(directory: Path, segment: Segment) -> Segment:
    """Seal a segment that was left open and has records; it may have its last name already. OSError of the kernel."""
    sealed = Segment(segment.stream, segment.number, segment.began_ns)
    path = directory / segment.name
    descriptor = os.open(path if path.exists() else directory / sealed.name, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    if path.exists():
        return seal_segment(directory, segment)
    sync_directory(directory)
    return sealed


def sync_directory(directory: Path) -> None:
    """Bring names of files to the disk. OSError of the kernel."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
