"""TCP: connections that bring messages, bounded in number, size and idle time."""

import selectors
import socket
import time
from typing import Final

from services.ingest.feed import StreamFeed
from services.ingest.framing import Framing
from shared.addresses import pack_address
from shared.batch import MAX_PAYLOAD, MAX_ROWS, make_rows
from shared.ledger import CONNECTIONS_EXPIRED, CONNECTIONS_REFUSED, CUT_OFF, RECEIVED
from shared.settings import Ingest

READ_SIZE: Final = 65_536
ACCEPTS_AT_ONCE: Final = 64
"""Connections taken in a row, so that a flood of them does not hold up datagrams."""


class Connection:
    """One sender's connection, from which each message becomes a datagram of the stream."""

    def __init__(self, sock: socket.socket, peer: tuple[str, int], feed: StreamFeed) -> None:
        self.socket = sock
        self.feed = feed
        self.heard_at = time.monotonic()
        self._framing = Framing()
        self._source, self._port = pack_address(peer[0].partition("%")[0]), peer[1]

    def read(self) -> bool:
        """Publish the messages that have come; return whether the connection goes on."""
        try:
            data = self.socket.recv(READ_SIZE)
        except BlockingIOError:
            return True
        except OSError:  # reset: what came before it is whole all the same
            return False
        self.heard_at = time.monotonic()
        self._publish(self._framing.feed(data))
        return bool(data) and not self._framing.overlong

    def end(self) -> None:
        """Close; the end of the connection ends its last message."""
        message, cut = self._framing.close()
        if message:
            self._publish([message])
        if cut and not self._framing.overlong:
            self.feed.account[RECEIVED] += 1
            self.feed.account[CUT_OFF] += 1
        if self._framing.overlong:
            self.feed.refuse_oversized(1)
        self.socket.close()

    def _publish(self, messages: list[bytes]) -> None:
        if not messages or not self.feed.receive(len(messages), sum(map(len, messages))):
            return
        now_ns = time.time_ns()
        start = size = 0
        for stop, message in enumerate(messages):
            if stop - start == MAX_ROWS or size + len(message) > MAX_PAYLOAD:
                self._publish_batch(now_ns, messages[start:stop])
                start, size = stop, 0
            size += len(message)
        self._publish_batch(now_ns, messages[start:])

    def _publish_batch(self, now_ns: int, messages: list[bytes]) -> None:
        rows = make_rows([len(message) for message in messages], [self._source] * len(messages), self._port)
        self.feed.publish(now_ns, rows, b"".join(messages))


class Connections:
    """Every listener and open connection of this worker."""

    def __init__(self, selector: selectors.BaseSelector, limits: Ingest) -> None:
        self._selector = selector
        self._limits = limits
        self._listeners: list[socket.socket] = []
        self._open: dict[int, Connection] = {}

    def listen(self, sock: socket.socket, feed: StreamFeed) -> None:
        """Accept on a listening socket from now on."""
        self._listeners.append(sock)
        self._selector.register(sock, selectors.EVENT_READ, lambda: self._accept(sock, feed))

    def _accept(self, listener: socket.socket, feed: StreamFeed) -> None:
        for _ in range(ACCEPTS_AT_ONCE):
            try:
                sock, peer = listener.accept()
            except OSError:  # nobody waits, they gave up, or no descriptor is left: the next poll says
                return
            if len(self._open) >= self._limits.tcp_connections:
                feed.account[CONNECTIONS_REFUSED] += 1
                sock.close()
                continue
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            connection = self._open[sock.fileno()] = Connection(sock, peer, feed)
            self._selector.register(sock, selectors.EVENT_READ, lambda it=connection: self._read(it))

    def _read(self, connection: Connection) -> None:
        if not connection.read():
            self._end(connection)

    def _end(self, connection: Connection) -> None:
        self._selector.unregister(connection.socket)
        del self._open[connection.socket.fileno()]
        connection.end()

    def expire(self) -> None:
        """End the connections that have sent nothing for too long."""
        before = time.monotonic() - self._limits.tcp_idle_seconds
        for connection in [each for each in self._open.values() if each.heard_at < before]:
            connection.feed.account[CONNECTIONS_EXPIRED] += 1
            self._end(connection)

    def close(self) -> None:
        """Stop accepting, take what has already come on each connection, and end it."""
        for listener in self._listeners:
            self._selector.unregister(listener)
            listener.close()
        for connection in list(self._open.values()):
            connection.read()
            self._end(connection)
