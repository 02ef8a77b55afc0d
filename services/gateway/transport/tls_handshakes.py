"""TLS handshakes, limited in number and time.

asyncio's own server has no limit of handshakes under way, and does not report those that fail.
"""

import asyncio
import socket
import ssl
from collections.abc import Coroutine
from typing import Any, Final

from services.gateway.counters import CONNECTIONS_REFUSED, HANDSHAKES_FAILED
from services.gateway.transport.listeners import BACKLOG, Listener
from services.gateway.transport.open_connections import OpenConnections
from services.gateway.transport.tls_connection import TlsConnection, limit_buffers
from shared.log import get_logger
from shared.net.connection_shares import origin_of

RETRY_SECONDS: Final = 1.0
"""Wait after a failed accept, for example without a descriptor to spare; asyncio waits as long too."""

log = get_logger()


class TlsAcceptor:
    """Accepts on TLS listeners, and makes a connection of each handshake that succeeds.

    `context` is that of the next handshakes.
    """

    def __init__(self, connections: OpenConnections, context: ssl.SSLContext) -> None:
        limit_buffers()
        self._open = connections
        self.context = context
        self._tasks: set[asyncio.Task[None]] = set()

    def accept_on(self, listener: Listener) -> None:
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
                sock, address = await asyncio.get_running_loop().sock_accept(listener.sock)
            except ConnectionAbortedError:  # the client has gone before it was accepted
                continue
            except OSError as error:
                log.warning("TLS connections can't be accepted for now", reason=error.strerror)
                await asyncio.sleep(RETRY_SECONDS)
                continue
            origin = origin_of(address[0])
            if self._open.begin(origin):
                self._start(self._shake_hands(sock, origin, remote=listener.remote))
            else:
                self._open.handler.counters[CONNECTIONS_REFUSED] += 1
                sock.close()
            await asyncio.sleep(0)  # give others a turn, however many clients connect

    async def _shake_hands(self, sock: socket.socket, origin: str, *, remote: bool) -> None:
        seconds = self._open.settings.request_seconds
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: TlsConnection(self._open, remote=remote),
                sock,
                ssl=self.context,
                ssl_handshake_timeout=seconds,
                ssl_shutdown_timeout=seconds,
            )
        except OSError as error:  # errors of ssl are OSErrors too
            self._open.handler.counters[HANDSHAKES_FAILED] += 1
            log.warning("a TLS handshake failed", reason=error.strerror or str(error) or type(error).__name__)
        finally:
            self._open.end_beginning(origin)
