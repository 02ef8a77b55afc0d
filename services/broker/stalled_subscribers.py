"""Relief when the broker's memory is short: it cuts off subscribers that read nothing; as a last resort nothing passes.

libzmq does not tell the length or the owner of a queue. But where a subscriber reads nothing, its connection's socket
stands still, and the kernel tells that. A subscriber that is cut off connects anew by itself, and the running counts
show what it missed. While nothing passes, messages wait at their publishers, which count what they drop.

Lowering the marks of queues instead would not help: libzmq acknowledges messages in steps of half a mark, and a queue
whose mark falls below its unacknowledged messages accepts nothing ever again.
"""

import fcntl
import os
import socket
import struct
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

from shared.log import get_logger
from shared.net.sockets import peer_credentials
from shared.process.memory import Memory

STANDSTILL_SECONDS: Final = 0.5
"""A socket with the same number of unread bytes at every check for this long has no reader. One that is read is filled
again at once, but hardly to the same byte at every check."""
CUT_OFF_RESERVE: Final = 2
"""Subscribers are cut off when less than one part in this many of the memory is left, as it takes a while to help."""
LAST_RESERVE: Final = 4
"""Nothing passes when it is one part in this many, into which the queues of publishers have to fit."""
NEAR_MS: Final = 20
FAR_MS: Final = 334
FASTEST: Final = 10**9
"""Milliseconds between two checks while little memory is taken; bytes a second that the bus brings at most."""

log = get_logger()


class StalledSubscribers:
    """Ends connections of subscribers to keep the broker below its ceiling.

    `hold` stops messages, or lets them pass again.

    `endpoint` is the path of the socket that subscribers connect to, `ports` are those of TCP.
    """

    def __init__(self, memory: Memory, endpoint: Path, ports: frozenset[int], hold: Callable[[bool], object]) -> None:
        self.cut = 0
        """Connections ended so far."""
        self._memory = memory
        self._hold = hold
        self._held = False
        self._addresses: set[str | int] = {str(endpoint), *ports}
        self._standing: dict[int, tuple[int, float]] = {}
        """By a socket's inode: its unread bytes, and the time since which they are unchanged."""

    def relieve_memory(self) -> int:
        """Measure the memory, and cut off or hold as needed; return the ms until that is due again."""
        ceiling = self._memory.ceiling
        if self._memory.measure():
            self._cut_off()
        if self._held != (self._memory.used > ceiling - ceiling // LAST_RESERVE > 0):
            self._held = not self._held
            self._hold(self._held)
        if not ceiling:
            return FAR_MS
        # The time in which what is left until subscribers are cut off could be taken.
        left = ceiling // CUT_OFF_RESERVE - self._memory.used
        return max(NEAR_MS, min(FAR_MS, 1000 * left // FASTEST))

    def _cut_off(self) -> None:
        """End the connections of subscribers that have read nothing for a while."""
        now, standing = time.monotonic(), {}
        for inode, sock in _connections(self._addresses):
            unread = _unread(sock)
            before, since = self._standing.get(inode, (0, now))
            if not unread or unread != before:
                since = now
            standing[inode] = unread, since
            if now - since >= STANDSTILL_SECONDS:
                log.warning("subscriber cut off: it reads nothing, and memory is short", peer=_peer(sock))
                sock.shutdown(socket.SHUT_RDWR)
                self.cut += 1
                del standing[inode]
        self._standing = standing


def _connections(addresses: set[str | int]) -> Iterator[tuple[int, socket.socket]]:
    """Yield the connections that came in at these paths or ports, each with its inode: a duplicate, for a moment."""
    for entry in list(Path("/proc/self/fd").iterdir()):
        with suppress(OSError):  # closed by now
            if not entry.is_socket():
                continue
            with socket.socket(fileno=os.dup(int(entry.name))) as sock:
                own = sock.getsockname()
                at = own if isinstance(own, str | bytes) else own[1]
                if at in addresses and not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                    yield os.fstat(sock.fileno()).st_ino, sock


def _unread(sock: socket.socket) -> int:
    """Return the bytes that the other end has not taken yet (SIOCOUTQ, unix(7) and tcp(7))."""
    return int(struct.unpack("i", fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)))[0])


def _peer(sock: socket.socket) -> str:
    if sock.family == socket.AF_UNIX:
        return f"process {peer_credentials(sock)[0]}"
    return "{}:{}".format(*sock.getpeername()[:2])
