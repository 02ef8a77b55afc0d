"""TLS handshakes, limited in number and time.

asyncio's own server has no limit of handshakes under way, and does not report those that fail.
"""

import asyncio
import socket
import ssl

from services.gateway.counters import CONNECTIONS_REFUSED, HANDSHAKES_FAILED
from services.gateway.transport.listeners import Listener
from services.gateway.transport.open_connections import OpenConnections
from services.gateway.transport.tls_connection import TlsConnection, limit_buffers
from shared.log import get_logger
from shared.process.acceptor import Acceptor, Work

log = get_logger()


class TlsAcceptor:
    """Accepts on TLS listeners, and makes a connection of each handshake that succeeds.

    `context` is that of the next handshakes.
    """

    def __init__(self, connections: OpenConnections, context: ssl.SSLContext) -> None:
        limit_buffers()
        self._open = connections
        self.context = context
        self._acceptor = Acceptor("TLS connections can't be accepted for now")

    def accept_on(self, listener: Listener) -> None:
        """Accept from now on."""

        def begin(sock: socket.socket, origin: str) -> Work | None:
            if self._open.begin_handshake(origin):
                return self._shake_hands(sock, origin, remote=listener.remote)
            self._open.handler.counters[CONNECTIONS_REFUSED] += 1
            return None

        self._acceptor.accept_on(listener.sock, begin)

    async def stop(self) -> None:
        """Accept no more, and cut the handshakes under way."""
        await self._acceptor.stop()

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
            reason = error.strerror or str(error) or type(error).__name__
            log.warning("a TLS handshake failed", origin=origin, reason=reason)
        finally:
            self._open.end_handshake(origin)
