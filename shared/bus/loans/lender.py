"""The lender's side of lent payloads: a worker's memory, the loans in it, and the socket where borrowers ask.

`shared.bus.loans` says why nobody ever sees another datagram's bytes.
"""

import fcntl
import mmap
import os
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np

from shared.log import get_logger
from shared.net.sockets import PathSocket, close_listener
from shared.process.file_locks import lock_at_once
from shared.process.lifecycle import CANT_CREATE, OperatorError

CHUNK: Final = 2 << 20
"""Bytes: a full batch of the largest datagrams that an Ethernet frame holds, and a quarter more."""
LENT_SIZE: Final = 16_384
"""Bytes; a smaller payload costs less to copy than to lend."""
LENDING: Final = "ingest."
"""Begins the names of those that lend: an uplink publishes as they do, and one of them has its number."""
GRACE_SECONDS: Final = 1.0
"""Time after a subscription in which nothing is lent."""
BACKLOG: Final = 64
MAX_BORROWERS: Final = 256
MAX_REQUEST: Final = 128
PAGE: Final = mmap.PAGESIZE
F_SEAL_FUTURE_WRITE: Final = 0x10
"""fcntl(2), since Linux 5.1; the module names it from Python 3.13 on."""
ANSWER: Final = struct.Struct("=QQQ")
"""The number lent last, the size of the memory in bytes, and the worker's boot id; with it come the memory's descriptor
and the page's."""


def pool_path(directory: Path, sender: str) -> Path:
    """Return the path at which a worker, such as `ingest.2`, is asked to lend."""
    return directory / f"pool.{sender.partition('.')[2]}"


def lock_path(path: Path) -> Path:
    """Return the path of the lock that a worker with this pool path holds while it lives."""
    return path.with_name(f"{path.name}.lock")


def _memory(name: str, size: int, *, ours_alone: bool) -> tuple[int, mmap.mmap]:
    """Return memory of a fixed size, as a descriptor to pass on and a view to write through.

    With `ours_alone` it can be written only through this view: a descriptor that can only be read could be opened anew.
    """
    seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | (F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL if ours_alone else 0)
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, size)
        memory = mmap.mmap(descriptor, size)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor, memory


log = get_logger()


class Loan:
    """A chunk to write a payload into: `memory` is `CHUNK` bytes."""

    __slots__ = ("chunk", "memory", "number")

    def __init__(self, number: int, chunk: int, memory: memoryview) -> None:
        self.number = number
        self.chunk = chunk
        self.memory = memory


class Room:
    """The bytes that the pools of a worker may take together."""

    def __init__(self, size: int) -> None:
        self._left = size

    def reserve(self, size: int) -> bool:
        """Reserve room for `size` more bytes; return whether there was any."""
        fits = size <= self._left
        self._left -= size * fits
        return fits


class Pool:
    """A worker's memory for the payloads of one stream, `size` bytes of it; it costs nothing until it is used.

    Chunks once used are kept. Where pools share a `room`, each further chunk is taken from it.
    """

    def __init__(self, stream: str, size: int, room: Room | None = None) -> None:
        self.stream = stream
        self.number = 0
        self._room = room or Room(size)
        self._used = 0
        self._size = size // CHUNK * CHUNK
        self._descriptor, memory = _memory(f"fanwire-{stream}", self._size, ours_alone=True)
        self._memory = memoryview(memory)
        self._numbers = np.zeros(self._size // CHUNK, np.uint64)
        self._pages: dict[socket.socket, memoryview] = {}
        self._lend_at = 0.0

    def hold_back(self) -> None:
        """Lend nothing for a moment: a new subscriber may not have borrowed yet."""
        self._lend_at = time.monotonic() + GRACE_SECONDS

    def lend(self) -> Loan | None:
        """Return a chunk that nobody reads, good until the next call; None when none is free, or nobody borrows."""
        if not self._pages or time.monotonic() < self._lend_at:
            return None
        given_back = min(page[0] for page in self._pages.values())
        free = self._numbers <= given_back
        chunk = int(free.argmax())  # the first is the likeliest to be in the processor's cache
        if not free[chunk]:
            return None
        if chunk >= self._used:
            if not self._room.reserve(CHUNK):
                return None
            self._used += 1
        return Loan(self.number + 1, chunk, self._memory[chunk * CHUNK : (chunk + 1) * CHUNK])

    def lent(self, loan: Loan) -> None:
        """Note that a loan has been published: nothing is written to its chunk until it is given back."""
        self._numbers[loan.chunk] = self.number = loan.number

    def admit(self, borrower: socket.socket, boot: int) -> None:
        """Wait for this borrower from now on, and pass it its descriptors. OSError when it does not take them."""
        page, memory = _memory("fanwire-page", PAGE, ours_alone=False)
        try:
            shared = memoryview(memory).cast("Q")
            shared[0] = self.number
            socket.send_fds(borrower, [ANSWER.pack(self.number, self._size, boot)], [self._descriptor, page])
            self._pages[borrower] = shared
        finally:
            os.close(page)

    def dismiss(self, borrower: socket.socket) -> None:
        """Wait for a borrower no longer: it is gone."""
        self._pages.pop(borrower, None)

    def close(self) -> None:
        """Let go of the memory; borrowers keep what they read."""
        self._pages.clear()
        os.close(self._descriptor)


class Lender:
    """Answers processes that want to borrow from a worker. OperatorError when another worker has the path.

    `boot` is that of the worker's messages. `watch` has a socket's readiness handled, `unwatch` ends that.
    """

    def __init__(
        self,
        path: Path,
        boot: int,
        pools: dict[str, Pool],
        watch: Callable[[socket.socket, Callable[[], object]], object],
        unwatch: Callable[[socket.socket], object],
    ) -> None:
        self._path = path
        self._boot = boot
        self._pools = pools
        self._lock = _lock(path)
        self._watch, self._unwatch = watch, unwatch
        self._borrowers: dict[socket.socket, Pool | None] = {}
        self._resting = False
        self._listener = self._listen()

    def _listen(self) -> PathSocket:
        listener = PathSocket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            listener.setblocking(False)
            self._path.unlink(missing_ok=True)  # left by a predecessor that was killed: the lock is ours
            listener.bind(str(self._path))
            self._path.chmod(0o777)  # the directory's mode decides, as for the bus
            listener.listen(BACKLOG)
        except OSError:
            listener.close()
            raise
        self._watch(listener, self._accept)
        return listener

    def _accept(self) -> None:
        try:
            borrower, _ = self._listener.accept()
        except (BlockingIOError, ConnectionError):  # it has given up
            return
        except OSError as error:  # such as no descriptors: until `renew` borrowers do without
            log.warning("can't lend to another subscriber", path=str(self._path), error=error.strerror)
            self._unwatch(self._listener)  # it stays readable, and would wake us for nothing
            self._resting = True
            return
        borrower.setblocking(False)
        if len(self._borrowers) >= MAX_BORROWERS:
            borrower.close()
            return
        self._borrowers[borrower] = None
        self._watch(borrower, lambda: self._hear(borrower))

    def renew(self) -> bool:
        """Accept again, if that has failed; make the path and its lock anew where others have removed them.

        Due every second. Return whether the path is a new one: nobody could ask to borrow meanwhile.
        """
        if self._resting:
            self._resting = False
            self._watch(self._listener, self._accept)
        try:
            return self._make_anew()
        except (OSError, OperatorError) as error:
            cause = error.strerror if isinstance(error, OSError) else str(error)
            log.error("payloads can't be lent to new subscribers, and go through the bus", cause=cause)
            return False

    def _make_anew(self) -> bool:
        if not os.fstat(self._lock).st_nlink:
            lock = _lock(self._path)
            os.close(self._lock)
            self._lock = lock
        elif self._listener.in_place:
            return False
        listener = self._listen()
        self._unwatch(self._listener)
        close_listener(self._listener)
        self._listener = listener
        log.warning("another program has removed a worker's pool: it was made anew", path=str(self._path))
        return True

    def _hear(self, borrower: socket.socket) -> None:
        """Read a borrower's request and admit it; it sends nothing after that, so further input means its end."""
        try:
            pool = self._pools.get(borrower.recv(MAX_REQUEST).decode())
            if pool is not None and self._borrowers[borrower] is None:
                pool.admit(borrower, self._boot)
                self._borrowers[borrower] = pool
                return
        except BlockingIOError:
            return
        except (OSError, ValueError):
            pass
        self._dismiss(borrower)

    def _dismiss(self, borrower: socket.socket) -> None:
        pool = self._borrowers.pop(borrower)
        if pool is not None:
            pool.dismiss(borrower)
        self._unwatch(borrower)
        borrower.close()

    def close(self) -> None:
        """Lend no more."""
        for borrower in list(self._borrowers):
            self._dismiss(borrower)
        if not self._resting:
            self._unwatch(self._listener)
        close_listener(self._listener)
        os.close(self._lock)


def _lock(path: Path) -> int:
    """Lock a path, and return the descriptor that holds the lock."""
    descriptor = os.open(lock_path(path), os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        return lock_at_once(descriptor)
    except OSError:
        number = path.suffix[1:]
        raise OperatorError(
            CANT_CREATE,
            f"another ingest worker on {path.parent} has number {number}; stop it, or start this one with "
            "HONCHO_PROCESS_NAME=ingest.N, a number that no other has",
        ) from None
