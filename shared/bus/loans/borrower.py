"""The borrower's side of lent payloads: memory of each worker that lends, and loans that are given back.

`shared.bus.loans` says why nobody ever sees another datagram's bytes.
"""

import mmap
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from shared.bus.loans.lender import ANSWER, CHUNK, LENDING, PAGE, pool_path
from shared.bus.messages import Datagrams, Envelope, MessageError, Part, datagrams_topic, inline_topic

MAX_UNREADABLE: Final = 256
"""Bounds what a borrower remembers of made-up workers."""


class _Loan:
    """The owner that every view of a borrowed payload keeps alive; its end gives the payload back."""

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
    """The payloads of one stream that one start of a worker lends, as a borrower sees them.

    OSError: no worker can be asked.

    `boot` identifies that start; memory of any other worker that answers at the path is not read.
    """

    def __init__(self, path: Path, stream: str, boot: int) -> None:
        self.boot = boot
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._connection.setblocking(False)
        self._memory: npt.NDArray[np.uint8] | None = None
        self._seen = 0
        self._closed = False
        self._out: dict[int, None] = {}
        """Loans not given back, in the order of their numbers."""
        self._lock = threading.RLock()  # any thread may drop a payload, even in the middle of this
        try:
            self._connection.connect(str(path))
            self._connection.send(stream.encode())
        except OSError:
            self._connection.close()
            raise

    @property
    def admitted(self) -> bool:
        """Return whether the worker waits for us: from now on we can read what it lends."""
        return self._memory is not None or self._receive_answer()

    @property
    def answered(self) -> bool:
        """Return whether the worker has admitted us, or never will."""
        return self.admitted or self._connection.fileno() < 0

    def _receive_answer(self) -> bool:
        """Map the memory, if the worker has answered by now."""
        descriptors: list[int] = []
        try:
            answer, descriptors, _, _ = socket.recv_fds(self._connection, ANSWER.size, 2)
            self._seen, size, boot = ANSWER.unpack(answer)
            if boot != self.boot:
                raise ValueError("the path is another worker's by now")
            memory, page = descriptors
            self._page = memoryview(mmap.mmap(page, PAGE)).cast("Q")
            self._memory = np.frombuffer(mmap.mmap(memory, size, prot=mmap.PROT_READ), np.uint8)
        except BlockingIOError:
            return False
        except (OSError, ValueError, struct.error):
            self._connection.close()  # the worker that answered must not wait for us
            return False
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        self._start = self._memory.ctypes.data
        return True

    def payload(self, number: int, chunk: int, size: int) -> memoryview | None:
        """Return the payload of a loan, a view; None when the worker does not wait for us to give this loan back."""
        if not self.admitted or self._memory is None or number <= self._seen:
            return None
        if not (0 <= chunk < len(self._memory) // CHUNK and 0 <= size <= CHUNK):
            return None
        with self._lock:
            self._out[number] = None
            self._seen = number
        return np.asarray(_Loan(self, number, self._start + chunk * CHUNK, size)).data

    def passed(self, number: int) -> None:
        """Give back what has not been read of the loans up to this number: they come no more."""
        if number > self._seen and self.admitted:
            with self._lock:
                self._seen = max(self._seen, number)
                self._settle()

    def give_back(self, number: int) -> None:
        """Give back a payload that nothing refers to any more."""
        with self._lock:
            del self._out[number]
            self._settle()
            if self._closed:
                self.close()

    def _settle(self) -> None:
        self._page[0] = next(iter(self._out)) - 1 if self._out else self._seen

    def close(self) -> None:
        """Borrow no more; the worker waits for us until we have given everything back."""
        with self._lock:
            self._closed = True
            if not self._out:
                self._connection.close()


class Borrower:
    """Borrows from every worker that lends in a bus directory, for a subscriber and in the order of its messages.

    Without a directory nothing can be borrowed. `subscribe` and `unsubscribe` are the subscriber's own: by a topic it
    asks for payloads in the messages, while it can't read what is lent.
    """

    def __init__(
        self, directory: Path | None, subscribe: Callable[[str], object], unsubscribe: Callable[[str], object]
    ) -> None:
        self._directory = directory
        self._subscribe, self._unsubscribe = subscribe, unsubscribe
        self._lenders: dict[tuple[str, str], Borrowed] = {}
        """By worker and stream."""
        self._unreadable: dict[str, set[str]] = {}
        """By stream whose payloads are asked for in the messages: the workers that lend what can't be read here."""

    def expect(self, prefix: str) -> None:
        """Ask for payloads in the messages, before a stream is subscribed to, until a worker has admitted us."""
        stream = prefix.partition("/")[2].removesuffix("/")
        if stream and prefix == datagrams_topic(stream):
            self._want_inline(stream)

    def borrow(self, envelope: Envelope, body: Datagrams, size: int) -> Part:
        """Return the payload of a message that lends it. MessageError when it can't be read here."""
        borrowed, payload = self._lender(envelope, body.stream), None
        if borrowed is not None and body.chunk is not None:
            payload = borrowed.payload(body.loan, body.chunk, size)
        if payload is None:
            self._want_inline(body.stream, envelope.sender)
            raise MessageError("not_borrowed", f"{envelope.sender} lends a payload that can't be read here")
        return payload

    def note_lending(self, envelope: Envelope, body: Datagrams, *, is_mark: bool) -> None:
        """Note the loan numbers in a message that lends nothing; a mark is a worker's first message to us."""
        if is_mark and self._lender(envelope, body.stream) is None and envelope.sender.startswith(LENDING):
            self._ask_to_lend(envelope, body.stream)
        borrowed = self._lender(envelope, body.stream)
        if borrowed is None:
            return
        borrowed.passed(body.loan)
        unreadable = self._unreadable.get(body.stream)
        if unreadable is not None and borrowed.admitted:
            unreadable.discard(envelope.sender)
            asked = [lender for (_, stream), lender in self._lenders.items() if stream == body.stream]
            if not unreadable and all(lender.answered for lender in asked):
                self._have_lent(body.stream)

    def _lender(self, envelope: Envelope, stream: str) -> Borrowed | None:
        """Return the loans of the very worker that sent a message, not of its predecessor or successor."""
        borrowed = self._lenders.get((envelope.sender, stream))
        return borrowed if borrowed is not None and borrowed.boot == envelope.boot else None

    def _ask_to_lend(self, envelope: Envelope, stream: str) -> None:
        """Ask a worker to lend to us too; ask for payloads in the messages when it can't be reached."""
        if known := self._lenders.pop((envelope.sender, stream), None):
            known.close()
        try:
            if self._directory is None:
                raise OSError
            borrowed = Borrowed(pool_path(self._directory, envelope.sender), stream, envelope.boot)
        except OSError:  # perhaps it lends nothing
            self._want_inline(stream, envelope.sender)
        else:
            self._lenders[envelope.sender, stream] = borrowed

    def _want_inline(self, stream: str, *workers: str) -> None:
        """Ask for a stream's payloads in the messages, until what these workers lend can be read here."""
        if stream not in self._unreadable:
            self._unreadable[stream] = set()
            self._subscribe(inline_topic(stream))
        if len(self._unreadable[stream]) < MAX_UNREADABLE:
            self._unreadable[stream].update(workers)

    def _have_lent(self, stream: str) -> None:
        """Ask for a stream's payloads in the messages no more."""
        del self._unreadable[stream]
        self._unsubscribe(inline_topic(stream))

    def keep_streams(self, prefixes: Iterable[str]) -> None:
        """Borrow only from streams with a topic of these prefixes: without their messages no loan is given back."""
        kept = tuple(prefixes)
        for key in list(self._lenders):
            if not datagrams_topic(key[1]).startswith(kept):
                self._lenders.pop(key).close()
        for stream in list(self._unreadable):
            if not datagrams_topic(stream).startswith(kept):
                self._have_lent(stream)

    def close(self) -> None:
        """Borrow no more."""
        for borrowed in self._lenders.values():
            borrowed.close()
        self._lenders.clear()
