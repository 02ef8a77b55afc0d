"""Payloads in shared memory: a worker lends them, and what it has lent it does not write over while it may be read.

Passing a payload through two sockets costs four copies of it. So a worker's large payloads stay where they are, in a
memfd of one chunk a batch; the bus carries the columns and a *loan*: which chunk, and the loan's number. Who may reach
the bus may borrow: it asks at an AF_UNIX socket in the bus directory, once a worker and stream, and is passed the
memory, to read only, and a page of its own, in which it says up to which number it has given everything back.

Why nobody ever sends another datagram's bytes, however long it is stopped in the middle of sending:

- Numbers grow, and a chunk has the number of its last loan. The worker writes into a chunk only when every borrower has
  given back that number (`Pool.lend`), so for each loan that is not given back the bytes stay as they were.
- A borrower gives back a number when nothing refers to its payload any more: that is what the object does which every
  view of the payload keeps alive (`_Loan`). One that is stopped gives nothing back.
- It reads no loan twice, and none made before the worker knew of it (`Borrowed.payload`): for those nobody waits.
- What is lost on the bus is given back by what follows: every message says how far lending had come, and messages keep
  their order (`Borrowed.passed`).
- The memory is sealed (fcntl(2)): nobody but the worker can write to it, and nobody can cut it short.
- A borrower is forgotten when its connection ends, which the kernel does when its process does, and not before.
- Without a free chunk, and for a moment after somebody has subscribed, who may not have borrowed yet, payloads go
  through the bus like small ones. So does everything while somebody wants `inline_topic`: who can't borrow.
"""

import fcntl
import mmap
import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

CHUNK: Final = 2 << 20
"""Bytes: a full batch of the largest datagrams that an Ethernet frame holds, and a quarter more."""
LENT_SIZE: Final = 16_384
"""Bytes; a smaller payload costs less to copy than to lend."""
GRACE_SECONDS: Final = 1.0
"""How long nothing is lent after somebody has subscribed."""
BACKLOG: Final = 64
MAX_BORROWERS: Final = 256
MAX_REQUEST: Final = 128
PAGE: Final = mmap.PAGESIZE
F_SEAL_FUTURE_WRITE: Final = 0x10
"""fcntl(2), since Linux 5.1; the module names it from Python 3.13 on."""
ANSWER: Final = struct.Struct("=QQ")
"""The number lent last, and the size of the memory in bytes; with it come the memory's descriptor and the page's."""


def pool_path(directory: Path, sender: str) -> Path:
    """Where a worker, as in `ingest.2`, is asked."""
    return directory / f"pool.{sender.partition('.')[2]}"


def _memory(name: str, size: int, *, ours_alone: bool) -> tuple[int, mmap.mmap]:
    """Memory of a size that stays as it is, as a descriptor to pass on and a view to write through.

    With `ours_alone` only through this view: a descriptor that can only be read could be opened anew.
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


class Loan:
    """A chunk to write a payload into: `memory` is `CHUNK` bytes."""

    __slots__ = ("chunk", "memory", "number")

    def __init__(self, number: int, chunk: int, memory: memoryview) -> None:
        self.number = number
        self.chunk = chunk
        self.memory = memory


class Room:
    """How many bytes the pools of a worker may take together."""

    def __init__(self, size: int) -> None:
        self._left = size

    def take(self, size: int) -> bool:
        """Whether there is room for so many more, which then is taken."""
        fits = size <= self._left
        self._left -= size * fits
        return fits


class Pool:
    """A worker's memory for the payloads of one stream, `size` bytes of it; costs nothing until it is used.

    What it has used it keeps; further chunks are taken out of the `room` that it shares with other pools, if it does.
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
        """Lend nothing for a moment: there is somebody new."""
        self._lend_at = time.monotonic() + GRACE_SECONDS

    def lend(self) -> Loan | None:
        """Return a chunk that nobody reads; None when there is none, or nobody to lend to. Good until the next call."""
        if not self._pages or time.monotonic() < self._lend_at:
            return None
        given_back = min(page[0] for page in self._pages.values())
        free = self._numbers <= given_back
        chunk = int(free.argmax())  # the first is the likeliest to be in the processor's cache
        if not free[chunk]:
            return None
        if chunk >= self._used:
            if not self._room.take(CHUNK):
                return None
            self._used += 1
        return Loan(self.number + 1, chunk, self._memory[chunk * CHUNK : (chunk + 1) * CHUNK])

    def lent(self, loan: Loan) -> None:
        """A loan has been published: its chunk is written to no more until it is given back."""
        self._numbers[loan.chunk] = self.number = loan.number

    def admit(self, borrower: socket.socket) -> None:
        """Wait for this borrower from now on, and pass it what it needs. OSError when it does not take it."""
        page, memory = _memory("fanwire-page", PAGE, ours_alone=False)
        try:
            shared = memoryview(memory).cast("Q")
            shared[0] = self.number
            socket.send_fds(borrower, [ANSWER.pack(self.number, self._size)], [self._descriptor, page])
            self._pages[borrower] = shared
        finally:
            os.close(page)

    def dismiss(self, borrower: socket.socket) -> None:
        """Wait for a borrower no longer: it is gone."""
        self._pages.pop(borrower, None)

    def close(self) -> None:
        """Let go of the memory; who has borrowed keeps what it reads."""
        self._pages.clear()
        os.close(self._descriptor)


class Lender:
    """Answers who wants to borrow from a worker. `watch` has a socket's readiness handled, `unwatch` no longer."""

    def __init__(
        self,
        path: Path,
        pools: dict[str, Pool],
        watch: Callable[[socket.socket, Callable[[], object]], object],
        unwatch: Callable[[socket.socket], object],
    ) -> None:
        self._path = path
        self._pools = pools
        self._watch, self._unwatch = watch, unwatch
        self._borrowers: dict[socket.socket, Pool | None] = {}
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.setblocking(False)
        path.unlink(missing_ok=True)  # a predecessor's: no two have one name
        self._listener.bind(str(path))
        path.chmod(0o777)  # who may enter the directory may reach the bus
        self._listener.listen(BACKLOG)
        watch(self._listener, self._accept)

    def _accept(self) -> None:
        with suppress(OSError):  # it has given up, or there are no descriptors: it will do without
            borrower, _ = self._listener.accept()
            borrower.setblocking(False)
            if len(self._borrowers) >= MAX_BORROWERS:
                borrower.close()
                return
            self._borrowers[borrower] = None
            self._watch(borrower, lambda: self._hear(borrower))

    def _hear(self, borrower: socket.socket) -> None:
        """Take what a borrower asks for; all that it says after that is that it is gone."""
        try:
            pool = self._pools.get(borrower.recv(MAX_REQUEST).decode())
            if pool is not None and self._borrowers[borrower] is None:
                pool.admit(borrower)
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
        """Lend to nobody any more."""
        for borrower in list(self._borrowers):
            self._dismiss(borrower)
        self._unwatch(self._listener)
        self._listener.close()
        self._path.unlink(missing_ok=True)


class _Loan:
    """What every view of a borrowed payload keeps alive; its end gives the payload back."""

    __slots__ = ("__array_interface__", "_borrowed", "_number")

    def __init__(self, borrowed: "Borrowed", number: int, address: int, size: int) -> None:
        self._borrowed, self._number = borrowed, number
        self.__array_interface__: dict[str, Any] = {
            "data": (address, True),
            "shape": (size,),
            "typestr": "|u1",
            "version": 3,
        }

    def __del__(self) -> None:
        self._borrowed.give_back(self._number)


class Borrowed:
    """What one worker lends of one stream, as a borrower sees it. OSError when there is nobody to ask."""

    def __init__(self, path: Path, stream: str) -> None:
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._connection.setblocking(False)
        self._memory: npt.NDArray[np.uint8] | None = None
        self._seen = 0
        self._closed = False
        self._out: dict[int, None] = {}
        """Loans not given back, in the order of their numbers."""
        self._lock = threading.RLock()  # any thread may drop a payload, and the garbage collector in the middle of this
        try:
            self._connection.connect(str(path))
            self._connection.send(stream.encode())
        except OSError:
            self._connection.close()
            raise

    def _take_answer(self) -> bool:
        """Whether the memory is there: it comes as soon as the worker turns to us."""
        if self._memory is not None:
            return True
        descriptors: list[int] = []
        try:
            answer, descriptors, _, _ = socket.recv_fds(self._connection, ANSWER.size, 2)
            self._seen, size = ANSWER.unpack(answer)
            memory, page = descriptors
            self._page = memoryview(mmap.mmap(page, PAGE)).cast("Q")
            self._memory = np.frombuffer(mmap.mmap(memory, size, prot=mmap.PROT_READ), np.uint8)
        except (OSError, ValueError, struct.error):
            return False
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        self._start = self._memory.ctypes.data
        return True

    @property
    def admitted(self) -> bool:
        """Whether the worker waits for us: what it lends from now on can be read."""
        return self._take_answer()

    def payload(self, number: int, chunk: int, size: int) -> memoryview | None:
        """The payload of a loan, a view; None when it is none that waits for us to give it back."""
        if not self._take_answer() or self._memory is None or number <= self._seen:
            return None
        if not (0 <= chunk < len(self._memory) // CHUNK and 0 <= size <= CHUNK):
            return None
        with self._lock:
            self._out[number] = None
            self._seen = number
        return np.asarray(_Loan(self, number, self._start + chunk * CHUNK, size)).data

    def passed(self, number: int) -> None:
        """Loans up to this number come no more: what of them has not been read is given back."""
        if number > self._seen and self._take_answer():
            with self._lock:
                self._seen = max(self._seen, number)
                self._settle()

    def give_back(self, number: int) -> None:
        """Nothing refers to this payload any more."""
        with self._lock:
            del self._out[number]
            self._settle()
            if self._closed:
                self.close()

    def _settle(self) -> None:
        self._page[0] = next(iter(self._out)) - 1 if self._out else self._seen

    def close(self) -> None:
        """Borrow no more; the worker waits for us until all is given back."""
        with self._lock:
            self._closed = True
            if not self._out:
                self._connection.close()
