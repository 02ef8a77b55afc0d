"""TCP connections that bring messages, limited in number, size and idle time, and in their share of a turn."""

import errno
import math
import selectors
import socket
import time
from collections import Counter
from typing import Final

from services.ingest.batch_publisher import StreamFeed
from services.ingest.octet_count_framing import Framing
from shared.datagrams.batch import make_rows
from shared.datagrams.limits import MAX_DATAGRAM, MAX_PAYLOAD, MAX_ROWS
from shared.ledger.counters import BYTES, CONNECTIONS_EXPIRED, CONNECTIONS_REFUSED, CUT_OFF, RECEIVED
from shared.log import get_logger
from shared.net.addresses import pack_address
from shared.net.connection_shares import limit_of, origin_of
from shared.net.sockets import InheritedSocket
from shared.process.lifecycle import descriptor_limit
from shared.settings.tables import Ingest

READ_SIZE: Final = 16_384
SHORT: Final = 16
"""Bytes: a connection whose messages are shorter, on average, is read in pieces of `SHORT_READ_SIZE`, since each
message costs about as much as a long one."""
SHORT_READ_SIZE: Final = 2_048
TURN_SECONDS: Final = 0.002
"""Time that TCP may take of a turn before datagrams, which nobody sends again, are read."""
LEAVE_SECONDS: Final = 1.0
"""Time that connections of a removed listener may go on."""
ACCEPTS_AT_ONCE: Final = 64
SPARE_DESCRIPTORS: Final = 128
"""Descriptors kept for listeners and the bus."""
NOBODY_WAITS: Final = (errno.EAGAIN, errno.EINTR, errno.ECONNABORTED, errno.EPROTO, errno.ENOPROTOOPT)
"""Errors of accept(2) when there is no connection, or one was given up; any other would come again at once."""
ENDED_BY_PEER: Final = (
    *(errno.ECONNRESET, errno.ECONNREFUSED, errno.ETIMEDOUT, errno.EPIPE),
    *(errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN),
)

Target = tuple[StreamFeed, Counter[str]]
"""The stream feed of a listening socket's messages, and its own account."""

log = get_logger()


class ExporterConnection:
    """One sender's connection; each of its messages becomes a datagram of the stream."""

    def __init__(
        self,
        sock: socket.socket,
        peer: tuple[str, int],
        feed: StreamFeed,
        account: Counter[str],
        listener: socket.socket,
    ) -> None:
        self.socket = sock
        self._account = account
        self.feed = feed
        self.listener = listener
        """The listener by which it came."""
        self.ends_at = math.inf
        """The latest time at which it is ended, and earlier once it is silent; infinite: its sender ends it."""
        self.heard_at = time.monotonic()
        self.ended = False
        self._framing = Framing()
        self._read_size = READ_SIZE
        self._source, self._port = pack_address(peer[0].partition("%")[0]), peer[1]
        self.origin = origin_of(peer[0])
        self._peer = f"{peer[0]} port {peer[1]}"

    def read(self) -> bool:
        """Publish the messages that have come; return whether there may be more. Sets `ended` when there will not."""
        try:
            data = self.socket.recv(self._read_size)
        except BlockingIOError:
            return False
        except OSError as error:  # reset: an unfinished message stays unfinished
            self.ended = True
            if error.errno not in ENDED_BY_PEER:
                log.error(
                    "can't read a TCP connection: it is closed",
                    stream=self.feed.stream,
                    error=error.strerror,
                    cause=error.errno,
                )
            return False
        self.heard_at = time.monotonic()
        messages = self._framing.feed(data)
        self._read_size = READ_SIZE if len(data) >= SHORT * len(messages) else SHORT_READ_SIZE
        self._publish(messages)
        if not data:  # the end of the connection is the end of its last message
            self._publish(self._framing.finish())
        self.ended = not data or self._framing.overlong
        return not self.ended

    def close(self) -> None:
        """Close; count messages that are unfinished, too long, or behind one that is too long as dropped."""
        overlong = self._framing.overlong
        cut_off = self._framing.lost_behind if overlong else int(self._framing.unfinished)
        self.feed.refuse_oversized(int(overlong))
        self.feed.account[RECEIVED] += cut_off
        self.feed.account[CUT_OFF] += cut_off
        self._account[RECEIVED] += overlong + cut_off
        if overlong:
            log.warning(
                f"connection closed: a message is longer than {MAX_DATAGRAM} bytes; "
                "end messages with a newline or NUL, or send their octet counts (RFC 6587)",
                stream=self.feed.stream,
                peer=self._peer,
                messages_lost=1 + cut_off,
                bytes_lost=self._framing.lost_bytes,
            )
        self.socket.close()

    def _publish(self, messages: list[bytes]) -> None:
        if not messages:
            return
        whole = sum(map(len, messages))
        self._account[RECEIVED] += len(messages)
        self._account[BYTES] += whole
        if not self.feed.receive(len(messages), whole):
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


class ExporterConnections:
    """Every listener and open connection of this worker."""

    def __init__(self, selector: selectors.BaseSelector, limits: Ingest) -> None:
        self._selector = selector
        self._idle_seconds = limits.tcp_idle_seconds
        self._limit = max(1, min(limits.tcp_connections, descriptor_limit() - SPARE_DESCRIPTORS))
        self._listeners: dict[socket.socket, Target] = {}
        self._paused: dict[socket.socket, Target] = {}
        self._most_of_origin = limits.tcp_connections_per_address
        self._open: set[ExporterConnection] = set()
        self._by_origin: Counter[str] = Counter()
        self._readable: dict[ExporterConnection, None] = {}
        """In the order in which they are due."""

    def listen(self, sock: socket.socket, feed: StreamFeed, account: Counter[str]) -> None:
        """Accept on a listening socket from now on; `account` is the listener's own."""
        self._listeners[sock] = feed, account
        self._selector.register(sock, selectors.EVENT_READ, lambda: self._accept(sock))

    def feed(self, listener: socket.socket) -> StreamFeed | None:
        """Return the feed of a listening socket."""
        target = self._listeners.get(listener) or self._paused.get(listener)
        return target[0] if target else None

    def leave(self, listener: socket.socket) -> None:
        """Accept no more on a listening socket, which stays open; end its connections once they have been read."""
        if listener in self._listeners:
            self._accept(listener)  # clients that wait may have sent messages already
        if self._listeners.pop(listener, None):
            self._selector.unregister(listener)
        self._paused.pop(listener, None)
        for connection in [connection for connection in self._open if connection.listener is listener]:
            connection.ends_at = time.monotonic() + LEAVE_SECONDS
            self._readable.setdefault(connection)

    def _accept(self, listener: socket.socket) -> None:
        feed, account = self._listeners[listener]
        for _ in range(ACCEPTS_AT_ONCE):
            try:
                sock, peer = listener.accept()
            except OSError as error:
                if error.errno not in NOBODY_WAITS:
                    self._pause(listener, error)
                return
            origin = origin_of(peer[0])
            if not self._has_room(origin):
                feed.account[CONNECTIONS_REFUSED] += 1
                log.warning(
                    "connection refused: the limit is reached; raise [ingest] tcp_connections or "
                    "tcp_connections_per_address",
                    stream=feed.stream,
                    limit=self._limit,
                )
                sock.close()
                continue
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            connection = ExporterConnection(sock, peer, feed, account, listener)
            self._open.add(connection)
            self._by_origin[origin] += 1
            self._selector.register(sock, selectors.EVENT_READ, lambda it=connection: self._note(it))

    def _note(self, connection: ExporterConnection) -> None:
        """Read a connection in its turn, unless it has ended since the kernel said that it has input."""
        if connection in self._open:
            self._readable.setdefault(connection)

    def _has_room(self, origin: str) -> bool:
        """Return whether one more may come from there: the last ones are for addresses that have none."""
        count = self._by_origin[origin]
        return count < self._most_of_origin and len(self._open) < limit_of(origin, self._limit, first=not count)

    def _pause(self, listener: socket.socket, error: OSError) -> None:
        """Accept again in a second: until then the listener would only wake the loop for nothing."""
        self._paused[listener] = self._listeners.pop(listener)
        self._selector.unregister(listener)
        stream = self._paused[listener][0].stream
        log.warning(
            "can't accept TCP connections; trying again in a second",
            stream=stream,
            error=error.strerror,
            cause=error.errno,
        )

    def read_due(self) -> None:
        """Read connections that have input, in turn, as long as a turn may take."""
        if not self._readable:
            return
        deadline = time.monotonic() + TURN_SECONDS
        while self._readable and time.monotonic() < deadline:
            connection = next(iter(self._readable))
            del self._readable[connection]
            more = connection.read()
            leaving = connection.ends_at < math.inf
            if connection.ended or (leaving and not more) or time.monotonic() >= connection.ends_at:
                self._end(connection)
            elif leaving:
                self._readable[connection] = None

    def _end(self, connection: ExporterConnection) -> None:
        self._selector.unregister(connection.socket)
        self._open.discard(connection)
        self._by_origin[connection.origin] -= 1
        if not self._by_origin[connection.origin]:
            del self._by_origin[connection.origin]
        self._readable.pop(connection, None)
        connection.close()

    def expire(self) -> None:
        """End the connections that have sent nothing for too long, and accept again where that was paused."""
        before = time.monotonic() - self._idle_seconds
        for connection in [each for each in self._open if each.heard_at < before]:
            connection.read()  # what has just come
            if connection.ended or connection.heard_at < before:
                connection.feed.account[CONNECTIONS_EXPIRED] += not connection.ended
                self._end(connection)
        paused, self._paused = self._paused, {}
        for listener, (feed, account) in paused.items():
            self.listen(listener, feed, account)

    def close(self, deadline: float) -> None:
        """Stop accepting, read what has already come on each connection, and end it.

        Clients that wait are accepted first, unless they wait at an inherited socket, for our successor.
        """
        for listener in list(self._listeners):
            if not isinstance(listener, InheritedSocket):
                self._accept(listener)
        for listener in self._listeners:
            self._selector.unregister(listener)
        for listener in (*self._listeners, *self._paused):
            listener.close()
        self._listeners, self._paused = {}, {}
        for connection in list(self._open):
            while connection.read() and time.monotonic() < deadline:
                pass
            self._end(connection)
