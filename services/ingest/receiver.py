"""From a datagram socket to batches: one receive call, its columns, cut where a bus message would grow too long."""

import socket
import time
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from services.ingest.feed import StreamFeed
from services.ingest.replies import Replier
from shared.addresses import LOCAL_SENDER
from shared.batch import MAX_DATAGRAM, MAX_PAYLOAD
from shared.ledger import KERNEL_DROPPED, RECEIVE_ERRORS
from shared.mmsg import ReceiveArena
from shared.sockets import InheritedSocket, close_listener, kernel_drops, refuse_input


class DatagramReceiver:
    """Receives from one UDP or AF_UNIX datagram socket."""

    def __init__(self, sock: socket.socket, feed: StreamFeed, arena: ReceiveArena, reply: bytes | None) -> None:
        self._socket = sock
        self._feed = feed
        self._arena = arena
        self._replier = Replier(sock, reply, feed.account) if reply and sock.family != socket.AF_UNIX else None
        self.inherited = isinstance(sock, InheritedSocket)
        self._kernel_dropped = kernel_drops(sock) if self.inherited else 0  # not what our predecessors accounted for

    def fileno(self) -> int:
        """The socket's descriptor."""
        return self._socket.fileno()

    def receive(self) -> tuple[int, int]:
        """Take what has come, at most 256 datagrams, onto the bus; return how many, and their bytes."""
        arena = self._arena
        try:
            count = arena.receive(self._socket.fileno())
        except OSError:  # an ICMP error to a reply of ours, or the kernel short of memory: the next call goes on
            self._feed.account[RECEIVE_ERRORS] += 1
            return 0, 0
        if count == 0:
            return 0, 0
        received_ns = time.time_ns()
        lengths = arena.lengths(count)
        size = int(lengths.sum())
        oversized = lengths[lengths > MAX_DATAGRAM]
        refused = len(oversized)
        if refused:
            self._feed.refuse_oversized(refused)
        if refused < count and self._feed.receive(count - refused, size - int(oversized.sum()) if refused else size):
            rows = arena.rows(count, self._socket.family)
            if self._socket.family == socket.AF_UNIX:
                rows["address"] = np.frombuffer(LOCAL_SENDER, np.uint8)
            for start, stop in cuts(lengths):
                self._feed.publish(received_ns, rows[start:stop], arena.payload(start, stop))
        if self._replier:
            self._replier.reply(arena, count)
        arena.restore(count)
        return count, size

    def count_kernel_drops(self) -> None:
        """Account for what the kernel dropped since the last call because the receive buffer was full."""
        drops = kernel_drops(self._socket)
        self._feed.account[KERNEL_DROPPED] += (drops - self._kernel_dropped) % (1 << 32)
        self._kernel_dropped = drops

    def refuse_input(self) -> None:
        """Take nothing new: what arrives from now on is dropped, and counted, by the kernel."""
        refuse_input(self._socket)

    def close(self) -> None:
        """Close the socket, and take the path of an AF_UNIX one away unless it was inherited."""
        close_listener(self._socket)


def cuts(lengths: npt.NDArray[np.uint32]) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of stretches that fit a bus message: at most `MAX_PAYLOAD` bytes, no datagram oversized."""
    ends = np.cumsum(lengths, dtype=np.int64)
    if ends[-1] <= MAX_PAYLOAD and lengths.max() <= MAX_DATAGRAM:
        yield 0, len(lengths)
        return
    start, before = 0, 0
    for oversized in [*np.flatnonzero(lengths > MAX_DATAGRAM).tolist(), len(lengths)]:
        while start < oversized:
            stop = min(int(np.searchsorted(ends, before + MAX_PAYLOAD, "right")), oversized)
            yield start, stop
            start, before = stop, int(ends[stop - 1])
        start = oversized + 1
        before = int(ends[oversized]) if oversized < len(ends) else before
