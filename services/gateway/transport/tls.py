"""TLS: the context that connections are made with, and their handshakes, bounded in number and time.

asyncio's own server has no bound on handshakes under way, and does not report those that fail.
"""

import asyncio
import asyncio.sslproto
import contextlib
import os
import socket
import ssl
from collections.abc import Coroutine, Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import structlog

from services.gateway.counters import CONNECTIONS_REFUSED, HANDSHAKES_FAILED
from services.gateway.transport.connection import REFUSING_MAX, Connection, Connections
from services.gateway.transport.listeners import BACKLOG, Listener
from shared.process.lifecycle import BAD_SETTINGS, OperatorError
from shared.settings.model import Gateway, Token

TLS_READ_SIZE: Final = 16 * 1024
"""Bytes, a record's: asyncio keeps so many for each connection, and takes 256 KiB by itself."""
RETRY_SECONDS: Final = 1.0
"""After a failed accept, as without a descriptor to spare; asyncio waits so long too."""

log = structlog.get_logger()


class TlsAcceptor:
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
                self._all.handler.counters[CONNECTIONS_REFUSED] += 1
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
            self._all.handler.counters[HANDSHAKES_FAILED] += 1
            log.warning("a TLS handshake failed", reason=error.strerror or str(error) or type(error).__name__)
        finally:
            self._under_way -= 1


def check_listener(listener: Listener, tokens: Iterable[Token]) -> None:
    """Raise OperatorError where somebody from elsewhere could come in without saying who it is."""
    if not listener.remote:
        return
    at = f"[gateway] listen: {listener.endpoint} is not loopback"
    if not listener.secure:
        raise _bad(f"{at}; use tls://, with a certificate and tokens, or listen on 127.0.0.1, [::1] or unix://")
    if not any(tokens):
        raise _bad(f"{at}, and nobody could use it; add a [[token]], which `fanwire token` makes")


def make_context(gateway: Gateway, tokens: Iterable[Token]) -> ssl.SSLContext:
    """What TLS connections are made with. OperatorError when the files can't be used."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # No tickets: a session that goes on would not show its certificate again, which may have expired meanwhile.
    context.num_tickets = 0
    context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_RENEGOTIATION
    if not (gateway.certificate and gateway.key):
        raise _bad("[gateway] certificate and key: expected a PEM file each, for tls:// listeners")
    certificate, key, authorities = map(_path, (gateway.certificate, gateway.key, gateway.client_authorities))
    with _loading("certificate and key", certificate, key):
        context.load_cert_chain(certificate, key, password=str)  # an empty one: OpenSSL would ask the terminal
    by_certificate = [token.certificate is not None for token in tokens]
    if gateway.client_authorities:
        with _loading("client_authorities", authorities):
            context.load_verify_locations(authorities)
        # Who has a token may come without a certificate; where nobody has, it would be of no use.
        context.verify_mode = ssl.CERT_REQUIRED if all(by_certificate) else ssl.CERT_OPTIONAL
    elif any(by_certificate):
        raise _bad("[gateway] client_authorities: expected a PEM file, for each [[token]] that has a certificate")
    return context


@contextlib.contextmanager
def _loading(what: str, *paths: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:  # OpenSSL's are OSErrors too, and it names no file
        reason = error.reason if isinstance(error, ssl.SSLError) and error.reason else error.strerror
        raise _bad(f"[gateway] {what}: {', '.join(map(str, paths))}: {reason}; expected PEM, unencrypted") from None


def _path(text: str) -> Path:
    return Path(os.path.expandvars(text))


def _bad(message: str) -> OperatorError:
    return OperatorError(BAD_SETTINGS, message)
