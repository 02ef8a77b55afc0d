"""Counters that outlive their process, however it ends: in a file that is mapped, for the successor to go on from.

A store to mapped memory is a store to the file, without a system call; it is there after SIGKILL too (mmap(2)). The
file begins with the place of its newest sheet, which is replaced by one store of 8 bytes. A sheet has a directory that
names the tables and their counters, and behind it the counts, 8 bytes each.

A process may be killed between any two stores. So what has to change together changes while the file is `suspended`,
and gets into it with the next sheet, at once.
"""

import mmap
import os
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

import msgspec

from shared.bus.zmq_sockets import HANDED_ON
from shared.client import Client
from shared.log import get_logger
from shared.process.file_locks import lock_at_once

NAME: Final = b"fanwire"
MAGIC: Final = int.from_bytes(NAME + b"2", "little")
"""Begins the file; the digit is its version. A release that knows another one begins the accounts anew."""
HEADER: Final = 16
"""Bytes before the first sheet: the magic number, and the place of the newest sheet; 0: there is none."""
SIZE: Final = struct.Struct("<q")
"""The size of a sheet's directory, in front of it."""
MAX_FILE: Final = 1 << 28
NO_SLOTS: Final = memoryview(b"").cast("q")
NOTHING: Final[Mapping[str, int]] = MappingProxyType({})

log = get_logger()


class Directory(msgspec.Struct, array_like=True):
    """The names of what a sheet counts: tables, each with the number of its set of counters; and the clients served."""

    counters: list[tuple[str, ...]] = []
    tables: list[tuple[str, int]] = []
    clients: list[Client] = []


class Sheet(msgspec.Struct):
    """The state that a process has left: the clients that it served, and its tables."""

    clients: list[Client] = []
    tables: dict[str, dict[str, int]] = {}


class KeptCounts(Counter[str]):
    """Counters that are also kept where `keep` says; `on_change` is called when one has no place there."""

    def __init__(self, on_change: Callable[[], None], counts: Mapping[str, int] = NOTHING) -> None:
        super().__init__(counts)
        self._on_change = on_change
        self._slots = NO_SLOTS
        self._places: Mapping[str, int] = {}

    def __setitem__(self, name: str, count: int) -> None:
        dict.__setitem__(self, name, count)
        place = self._places.get(name)
        if place is None:
            self._on_change()
        else:
            self._slots[place] = count

    def keep(self, slots: memoryview, places: Mapping[str, int]) -> None:
        """Keep these counters in `slots`, int64, at their places."""
        self._slots, self._places = slots, places
        for name, place in places.items():
            slots[place] = self.get(name, 0)


class KeptFile:
    """The file in which one process keeps its counters; `stale` says that some have no place there yet.

    While it is `suspended` it stays as it is, whatever is counted. Without a file nothing is kept, and nothing is ever
    stale or suspended.
    """

    def __init__(self, path: Path | None) -> None:
        self.stale = self.suspended = False
        self._path = path
        self._file = -1
        self._map: mmap.mmap | None = None
        self._tables: list[KeptCounts] = []
        self._sheet = HEADER, HEADER
        """The places at which the newest sheet begins and ends."""

    def new_counts(self, counts: Mapping[str, int] = NOTHING) -> KeptCounts:
        """Return counters that are kept from the next `keep` on that names them."""
        self._note_change()
        return KeptCounts(self._note_change, counts)

    def _note_change(self) -> None:
        self.stale = self._file >= 0

    def suspend(self) -> None:
        """Leave the file as it is until the next `keep`, which replaces all of it at once."""
        if not self.suspended:
            self._forget_tables()
            self.stale = self.suspended = self._file >= 0

    def open(self) -> Sheet:
        """Take the file, and return what the last process has left in it; nothing where it can't be read.

        BlockingIOError: another process has it.
        """
        if self._path is None:
            return Sheet()
        try:
            self._file = _lock(self._path)
            content = os.pread(self._file, MAX_FILE, 0)
        except BlockingIOError:
            raise
        except OSError as error:
            self._do_without(error)
            return Sheet()
        self.stale = True
        try:
            sheet, self._sheet = read_sheet(content)
        except (ValueError, msgspec.MsgspecError) as error:
            if content:
                log.warning("accounts begin anew, since their file can't be read", reason=str(error))
            os.truncate(self._file, 0)
            return Sheet()
        return sheet

    def renew(self) -> bool:
        """Make the file anew where another program has removed it; return whether that was so. Due every second."""
        if self._path is None or self._file < 0 or os.fstat(self._file).st_nlink or self._path.parent == HANDED_ON:
            return False
        try:
            fresh = _lock(self._path)
        except OSError:  # the next look tries again
            return False
        self.close()
        self._file, self._sheet = fresh, (HEADER, HEADER)
        os.truncate(fresh, 0)
        self.suspend()
        log.warning("another program has removed the file of accounts: it was made anew", file=str(self._path))
        return True

    def _do_without(self, error: OSError) -> None:
        self.close()
        log.warning(
            "accounts end with this process: their file can't be used; check the bus directory and its free space",
            file=str(self._path),
            error=error.strerror,
        )

    def keep(
        self, clients: Iterable[Client], tables: Mapping[str, Counter[str]], room: Mapping[str, Iterable[str]]
    ) -> None:
        """Keep these tables, and no others, from now on; `room` has counters to expect by kind, as in `kind/name`."""
        self.stale = self.suspended = False
        if self._file < 0:
            return
        sets: dict[tuple[str, ...], int] = {}
        numbers = []
        for name, table in tables.items():
            counters = tuple(dict.fromkeys((*room.get(name.partition("/")[0], ()), *table)))
            numbers.append((name, sets.setdefault(counters, len(sets))))
        names = msgspec.json.encode(Directory(list(sets), numbers, list(clients)))
        names += b" " * (-len(names) % 8)
        places = [{name: place for place, name in enumerate(counters)} for counters in sets]
        size = 8 + len(names) + 8 * sum(len(places[number]) for _, number in numbers)
        begin, end = self._sheet
        at = HEADER if HEADER + size <= begin else end  # the newest sheet stays whole until this one is
        self._forget_tables()
        try:
            view = self._mapped(at + size)
        except OSError as error:
            os.truncate(self._file, 0)  # a successor would take what is sent from now on for unserved
            self._do_without(error)
            return
        start = at + 8 + len(names)
        view[at:start] = SIZE.pack(len(names)) + names
        self._tables = [table for table in tables.values() if isinstance(table, KeptCounts)]
        for (_, number), table in zip(numbers, self._tables, strict=True):
            stop = start + 8 * len(places[number])
            table.keep(view[start:stop].cast("q"), places[number])
            start = stop
        header = view[:HEADER].cast("q")
        header[1] = at  # by this store the sheet takes the place of the one before; in a new file by the next
        header[0] = MAGIC
        self._sheet = at, start

    def _forget_tables(self) -> None:
        for table in self._tables:
            table.keep(NO_SLOTS, {})
        self._tables = []

    def _mapped(self, size: int) -> memoryview:
        """Return the file's memory, which no table uses now, with this size at least."""
        if self._map is None or size > len(self._map):
            os.posix_fallocate(self._file, 0, size)  # a store to what the disk has no room for would end the process
            if self._map is not None:
                self._map.close()
            self._map = mmap.mmap(self._file, size)
        return memoryview(self._map)

    def close(self) -> None:
        """Let go of the file, which stays for the successor."""
        self._forget_tables()
        if self._map is not None:
            self._map.close()
            self._map = None
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        self.stale = self.suspended = False


def _lock(path: Path) -> int:
    """Open and lock a file, and return its descriptor. BlockingIOError: another process has it."""
    follow = 0 if path.parent == HANDED_ON else os.O_NOFOLLOW
    return lock_at_once(os.open(path, os.O_RDWR | os.O_CREAT | follow, 0o600))


def read_sheet(content: bytes) -> tuple[Sheet, tuple[int, int]]:
    """Return the newest sheet of a file's content, and where it begins and ends. ValueError or MsgspecError: none."""
    if len(content) < HEADER or SIZE.unpack_from(content)[0] != MAGIC:
        raise ValueError("of another version of fanwire" if content.startswith(NAME) else "damaged")
    (at,) = SIZE.unpack_from(content, 8)
    if not HEADER <= at <= len(content) - 8 or at % 8:
        raise ValueError("damaged")
    (size,) = SIZE.unpack_from(content, at)
    start = at + 8 + size
    if size < 0 or size % 8 or start > len(content):
        raise ValueError("damaged")
    directory = msgspec.json.decode(content[at + 8 : start], type=Directory)
    tables = {}
    for name, number in directory.tables:
        if not 0 <= number < len(directory.counters):
            raise ValueError("damaged")
        counters = directory.counters[number]
        stop = start + 8 * len(counters)
        if stop > len(content):
            raise ValueError("damaged")
        counts = memoryview(content)[start:stop].cast("q")
        tables[name] = {counter: count for counter, count in zip(counters, counts, strict=True) if count}
        start = stop
    return Sheet(directory.clients, tables), (at, start)
