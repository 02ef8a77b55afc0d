"""A client's connection by TLS, where asyncio's differs from one by TCP.

There is no half-closed connection: asyncio ends both directions at once. A client that closes ends the conversation.
The gateway closes as soon as the client has been silent for a moment after the last answer, since closing while bytes
come would answer them with a reset.
"""

import asyncio.sslproto
from typing import TYPE_CHECKING, Final

from services.gateway.transport.connection import ClientConnection

if TYPE_CHECKING:
    from services.gateway.transport.open_connections import OpenConnections

TLS_READ_SIZE: Final = 16 * 1024
"""Bytes of a record: asyncio keeps a buffer of this size for each connection, 256 KiB by default."""


def limit_buffers() -> None:
    """Set the buffer size of connections from now on to `TLS_READ_SIZE`; asyncio has no public way for that."""
    asyncio.sslproto.SSLProtocol.max_size = TLS_READ_SIZE


class TlsConnection(ClientConnection):
    """A connection that ends in both directions at once."""

    __slots__ = ("_awaits_silence",)

    def __init__(self, connections: "OpenConnections", *, remote: bool) -> None:
        super().__init__(connections, remote=remote)
        self._awaits_silence = False

    def buffer_updated(self, nbytes: int) -> None:
        """Hand over the bytes that were read; the client is not silent yet."""
        super().buffer_updated(nbytes)
        if self._awaits_silence:
            self.conversation.deadlines.await_silence()

    def eof_received(self) -> bool:
        """Let asyncio close now: nothing that is written arrives any more."""
        self.conversation.abandon()
        return False

    def expire(self) -> None:
        """Close once the client is silent; else act on the deadline."""
        if self._awaits_silence and not self._transport.is_closing():
            self._transport.close()
            self.conversation.deadlines.end()  # asyncio gives it ssl_shutdown_timeout
        else:
            super().expire()

    def _half_close(self) -> None:
        self._awaits_silence = True
        self.conversation.deadlines.await_silence()
