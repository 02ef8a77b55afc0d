"""The thread that waits for the disk: it syncs, seals and removes, so that taking batches does not wait."""

import contextlib
import os
from collections.abc import Callable, Iterable, Set
from dataclasses import replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Final, TypeVar

from shared.journal.retention import Kept
from shared.journal.segment_reader import SegmentReader
from shared.journal.segment_writer import SegmentWriter, seal_left, sync_directory
from shared.journal.segments import Segment, parse_name
from shared.log import get_logger

Job = Callable[[], None]
R = TypeVar("R")
JOIN_SECONDS: Final = 2.5
"""Time that the disk may take at the end; the process has to end within 4 s."""

log = get_logger()


class DiskThread:
    """Does jobs in their order; what they have found is applied when the loop calls `collect`."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[Callable[[], Job] | None] = SimpleQueue()
        self._done: SimpleQueue[Job] = SimpleQueue()
        self._thread = Thread(target=self._run, name="disk", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                self._done.put(job())
            except Exception as error:  # the loop raises it: this thread alone would end unseen
                self._done.put(partial(_raise, error))

    def submit(self, job: Callable[[], Job]) -> None:
        """Do a job when its turn comes; the function that it returns is for the loop to call."""
        self._jobs.put(job)

    def collect(self) -> None:
        """Apply what has been done since the last call; raise what a job has raised."""
        while not self._done.empty():
            self._done.get()()

    def close(self) -> bool:
        """Do all jobs that are there, and end; return whether they were done in time."""
        self._jobs.put(None)
        self._thread.join(JOIN_SECONDS)
        self.collect()
        return not self._thread.is_alive()


def _raise(error: Exception) -> None:
    raise error


def sync(writers: list[SegmentWriter]) -> OSError | None:
    """Bring segments to the disk; return the first error."""
    failed = None
    for writer in writers:
        try:
            writer.sync()
        except OSError as error:
            failed = failed or error
    return failed


def seal(writer: SegmentWriter) -> Segment | OSError:
    """Seal a segment; return it as it is then, or the error: then `seal_again` is to be called."""
    try:
        return writer.seal()
    except OSError as error:
        return error


def seal_again(directory: Path, segment: Segment) -> Segment | OSError:
    """Seal a segment of the stream in `directory` for which `seal` has failed; likewise."""
    try:
        return seal_left(directory, segment)
    except OSError as error:
        return error


def remove(directory: Path, segment: Segment, rows: int | None) -> tuple[int, OSError | None]:
    """Remove a segment of the stream in `directory`; return the datagrams in it: counted here where `rows` is None."""
    if rows is None:
        rows = _count_rows(directory / segment.name, segment)
    try:
        for name in segment.names:
            (directory / name).unlink(missing_ok=True)
        sync_directory(directory)
    except FileNotFoundError:  # another program has removed the directory
        return rows, None
    except OSError as error:
        return rows, error
    return rows, None


def _count_rows(path: Path, segment: Segment) -> int:
    """Return the datagrams in a segment, as far as it can be read."""
    if segment.is_readable:
        with contextlib.suppress(OSError), SegmentReader(path, segment) as reader:
            return sum(head.rows for head in reader.heads())
    return 0


def changed_ns(directory: Path) -> int:
    """Return when names in a directory have changed last; 0: it is not there, or tells nothing."""
    try:
        return directory.stat().st_mtime_ns
    except OSError:
        return 0


def find_changed(directory: Path, some: Iterable[Kept]) -> list[tuple[Kept, Kept | None]] | OSError:
    """Return those of a stream's segments that have another name by now, as they are then; None: they are gone."""
    try:
        with os.scandir(directory) as files:
            names = {file.name for file in files}
    except FileNotFoundError:
        names = set()
    except OSError as error:
        return error
    return [(each, _as_now(directory, each, names)) for each in some if each.segment.name not in names]


def _as_now(directory: Path, kept: Kept, names: Set[str]) -> Kept | None:
    for name in names & kept.segment.names:
        if segment := parse_name(kept.segment.stream, name):
            with contextlib.suppress(FileNotFoundError):
                return replace(kept, segment=segment, size=(directory / name).lstat().st_size)
    return None


def room_on(directory: Path) -> tuple[int, int]:
    """Return the bytes that this user can still write on the directory's disk, and those that it has. OSError."""
    found = os.statvfs(directory)
    return found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize
