"""TLS handshakes of those who connect: bounded in number and time, and those that fail are counted.

asyncio's own server has no bound on handshakes under way, and says nothing of those that fail.
"""

import asyncio
import asyncio.sslproto
import socket
import ssl
from collections.abc import Coroutine
from typing import Any, Final

import structlog

from services.gateway.connection import REFUSING_MAX, Connection, Connections
from services.gateway.counters import CONNECTIONS_REFUSED, HANDSHAKES_FAILED
from services.gateway.listeners import BACKLOG, Listener

TLS_READ_SIZE: Final = 16 * 1024
"""Bytes, a record's: asyncio keeps so many for each connection, and takes 256 KiB by itself."""
RETRY_SECONDS: Final = 1.0
"""After a failed accept, as without a descriptor to spare; asyncio waits so long too."""

log = structlog.get_logger()


class Handshakes:
    """Accepts on TLS listeners, and makes a `Connection` of each handshake that succeeds."""

    def __init__(self, connections: Connections, context: ssl.SSLContext) -> None:
        asyncio.sslproto.SSLProtocol.max_size = TLS_READ_SIZE
        self._all = connections
        self._context = context
        self._tasks: set[asyncio.Task[None]] = set()
        self._under_way = 0

    def serve(self, listener: Listener) -> None:
        """Accept from now on."""
        listener.sock.listen(BACKLOG)
        self._start(self._accept(listener))

    async def stop(self) -> None:
        """Accept no more, and cut the handshakes under way."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self, listener: Listener) -> None:
        while True:
            try:
                sock, _ = await asyncio.get_running_loop().sock_accept(listener.sock)
            except ConnectionAbortedError:  # the client has gone before we came
                continue
            except OSError as error:
                log.warning("no connection can be accepted", reason=error.strerror)
                await asyncio.sleep(RETRY_SECONDS)
                continue
            if len(self._all.open) + self._under_way < self._all.limit + REFUSING_MAX:
                self._under_way += 1
                self._start(self._shake_hands(sock, remote=listener.remote))
            else:
                self._all.desk.counters[CONNECTIONS_REFUSED] += 1
                sock.close()
            await asyncio.sleep(0)  # the others' turn, however many connect

    async def _shake_hands(self, sock: socket.socket, *, remote: bool) -> None:
        seconds = self._all.settings.request_seconds
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: Connection(self._all, remote=remote),
                sock,
                ssl=self._context,
                ssl_handshake_timeout=seconds,
                ssl_shutdown_timeout=seconds,
            )
        except OSError as error:  # those of ssl are, too
            self._all.desk.counters[HANDSHAKES_FAILED] += 1
            log.warning("a TLS handshake failed", reason=error.strerror or str(error) or type(error).__name__)
        finally:
            self._under_way -= 1
