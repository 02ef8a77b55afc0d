"""One connection to a NATS server: opened with this site's rights, by TLS where the settings say so."""

import asyncio
import itertools
import secrets
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from typing import Any, Final

from nats.aio.client import Client
from nats.errors import Error as NatsError

from shared.nats.access import credentials, tls_context
from shared.net.addresses import Endpoint
from shared.settings.uplink import Uplink

CONNECT_SECONDS: Final = 5
OWN_TRIES: Final = 3
"""Attempts, of which none takes long: a server that has just been started is there soon."""
CLOSE_SECONDS: Final = 1.0
"""Time for a farewell: a server that is gone does not answer one by TLS."""


class ConnectError(Exception):
    """A connection can't be made."""


class CarefulClient(Client):
    """nats-py's client; it goes on reading whatever is in a message, and proves itself by TLS alone where that is due.

    nats-py reads nothing more by a connection behind a subject or a header that it can't decode. A server passes both
    on. So one message of one site would cost all others, with each connection again, as nobody acknowledges it.
    """

    def check_server(self) -> None:
        """Raise NatsError where what proves this site would be seen by others, who could pass it on to the server."""
        assert self._current_server is not None
        # A server, or who stands before it, may say that it has no TLS: nats-py then goes on without.
        if self._current_server.uri.scheme == "tls" and not self._server_info.get("tls_required"):
            raise NatsError("it does not ask for TLS; set tls in the server's settings")
        if not isinstance(self.max_payload, int):
            raise NatsError("it tells no max_payload")

    def _connect_command(self) -> bytes:
        self.check_server()
        return super()._connect_command()

    async def _process_headers(self, headers: bytes) -> dict[str, str] | None:
        try:
            return await super()._process_headers(headers)
        except (UnicodeDecodeError, IndexError):
            return None

    def _build_message(self, sid: int, subject: bytes, *rest: Any) -> Any:
        return super()._build_message(sid, subject.decode(errors="replace").encode(), *rest)


class _OpeningError(Exception):
    """The first error at the opening of a connection."""


async def open_connection(
    client: CarefulClient,
    uplink: Uplink,
    endpoint: Endpoint,
    ended: Callable[[], Awaitable[None]],
    failed: Callable[[Exception], Awaitable[None]],
    ping_seconds: int,
) -> None:
    """Connect `client` to a server; `failed` gets later errors, `ended` is called at its end. ConnectError.

    nats-py could connect again by itself. But then it first sends what it had not yet sent, and so changes the order.
    """
    opening = asyncio.current_task()
    tls = tls_context(uplink) if endpoint.scheme == "tls" else None
    access = credentials(uplink)

    async def note_error(error: Exception) -> None:
        if asyncio.current_task() is opening:
            raise _OpeningError(reason(error))  # nats-py would try the same server again, for ever
        await failed(error)

    try:
        await client.connect(
            servers=[str(endpoint)],
            name=f"fanwire {uplink.site}",
            allow_reconnect=False,
            connect_timeout=CONNECT_SECONDS,
            ping_interval=ping_seconds,
            inbox_prefix=f"_INBOX_{uplink.site}",
            no_echo=True,
            error_cb=note_error,
            disconnected_cb=ended,
            closed_cb=ended,
            tls=tls,
            **access,
        )
        client.check_server()  # here too: another release of nats-py may not ask before
        _ = client.connected_server_version.major  # raises where it can't be read
    except Exception as error:  # nats-py checks nothing of what a server says of itself
        opening = None  # the farewell may fail too
        await close_connection(client)
        raise ConnectError(f"can't connect to {endpoint}: {reason(error)}") from None
    opening = None


async def close_connection(client: Client) -> None:
    """End a connection."""
    with suppress(NatsError, OSError, TimeoutError):
        async with asyncio.timeout(CLOSE_SECONDS):
            await client.close()


def reason(error: BaseException) -> str:
    """Return what an error says; some of nats-py's say nothing but their name, and all begin with its own."""
    return str(error).removeprefix("nats: ") or type(error).__name__


def rotated(uplink: Uplink) -> Iterator[Endpoint]:
    """Yield the servers in turn, for ever, from one that was drawn: so that not all sites use the same.

    A node tries its own, the first, several times before another one, which may go with its node.
    """
    own, *others = uplink.endpoints
    if uplink.nodes and others:
        return itertools.cycle([each for other in others for each in (*[own] * OWN_TRIES, other)])
    return itertools.islice(itertools.cycle(uplink.endpoints), secrets.randbelow(len(uplink.endpoints)), None)
