"""The HTTP server, whose connections are limited in number and time: to open one takes no token."""

import asyncio
import contextlib
import socket
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any, Final

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from services.console.bus_watch import next_look
from shared.ledger.counters import CONNECTIONS_EXPIRED, CONNECTIONS_REFUSED
from shared.log import get_logger
from shared.net.connection_shares import limit_of
from shared.process.acceptor import Acceptor, Work

MAX_OPEN: Final = 512
"""Connections of all listeners. One eighth is kept for this host, another for addresses that have none."""
MAX_OF_ORIGIN: Final = 256
"""Those of one address, or one /64 of IPv6: as many as 200 pages behind a proxy need."""
REQUEST_SECONDS: Final = 10.0
"""Time for a handshake; and for a request, from the connection's begin or the request's first byte."""

log = get_logger()


class OpenConnections:
    """The number of connections, in all and by origin; `counters` count those refused, or cut for being late."""

    def __init__(self, counters: Counter[str]) -> None:
        self.counters = counters
        self._by_origin: Counter[str] = Counter()

    def begin(self, origin: str) -> bool:
        """Note a connection that begins, unless there is no room for it; `end` ends it."""
        own = self._by_origin[origin]
        if own < MAX_OF_ORIGIN and self._by_origin.total() < limit_of(origin, MAX_OPEN, first=not own):
            self._by_origin[origin] += 1
            return True
        self.counters[CONNECTIONS_REFUSED] += 1
        log.warning("connection closed at once, as too many are open", origin=origin, of_this_origin=own)
        return False

    def end(self, origin: str) -> None:
        """Note that a connection, or its handshake, has ended."""
        self._by_origin[origin] -= 1
        if not self._by_origin[origin]:
            del self._by_origin[origin]


class Connection(H11Protocol):
    """A connection that is cut when a request is not complete in time.

    uvicorn itself has a limit only for the time between an answer and the next byte.
    """

    def __init__(self, server: "Server", origin: str) -> None:
        super().__init__(server.config, server.server_state, server.lifespan.state)
        self._open = server.connections
        self._origin = origin
        self._deadline: asyncio.TimerHandle | None = None
        self.made = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait for a request."""
        super().connection_made(transport)  # type: ignore[arg-type]
        self.made = True
        self._await_request()

    def data_received(self, data: bytes) -> None:
        """Take bytes, which do not postpone the deadline."""
        super().data_received(data)
        self._await_request()

    def connection_lost(self, exc: Exception | None) -> None:
        """Make room for another."""
        super().connection_lost(exc)
        self._forget_deadline()
        self._open.end(self._origin)

    def _await_request(self) -> None:
        if self.transport.is_closing() or self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            self._forget_deadline()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(REQUEST_SECONDS, self._expire)

    def _forget_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _expire(self) -> None:
        self._open.counters[CONNECTIONS_EXPIRED] += 1
        self.transport.abort()


class Server(uvicorn.Server):
    """A server whose signals are ours, which wakes once a second instead of ten times, and limits connections."""

    def __init__(self, config: uvicorn.Config, connections: OpenConnections) -> None:
        super().__init__(config)
        self.connections = connections
        self._ended = asyncio.Event()
        self._acceptor = Acceptor("connections can't be accepted for now")

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept on these sockets."""
        await super().startup(sockets=[])
        for sock in sockets or ():
            sock.setblocking(False)
            self._acceptor.accept_on(sock, self._admit)

    async def main_loop(self) -> None:
        """Renew the date that answers carry, with the watch's own tick, until the end."""
        while not await self.on_tick(0):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(next_look(time.monotonic(), 1.0) - time.monotonic()):
                    await self._ended.wait()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept no more, cut the handshakes under way, and end the rest."""
        await self._acceptor.stop()
        await super().shutdown(sockets)

    def end(self) -> None:
        """Take no more connections, and let `serve` return."""
        self.should_exit = True
        self._ended.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone."""
        yield

    def _admit(self, sock: socket.socket, origin: str) -> Work | None:
        return self._begin(sock, origin) if self.connections.begin(origin) else None

    async def _begin(self, sock: socket.socket, origin: str) -> None:
        connection = Connection(self, origin)
        limits = {"ssl_handshake_timeout": REQUEST_SECONDS, "ssl_shutdown_timeout": REQUEST_SECONDS}
        secure: dict[str, Any] = {"ssl": self.config.ssl, **limits} if self.config.ssl else {}
        try:
            with contextlib.suppress(OSError):  # a handshake that fails, or the end of a connection that is gone
                await asyncio.get_running_loop().connect_accepted_socket(lambda: connection, sock, **secure)
        finally:
            if not connection.made:
                self.connections.end(origin)
