import asyncio
import errno
import socket
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from structlog.testing import capture_logs

from services.console import connections
from services.console.connections import OpenConnections, Server
from shared.process import acceptor
from tests.certificates import Authority

REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def _app(scope: Any, receive: Any, send: Any) -> None:
    """Answer at once; at /body once all of it has come; at /lasting until the client has gone."""
    if scope["path"] == "/body":
        while (await receive()).get("more_body"):
            pass
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    if scope["path"] == "/lasting":
        await send({"type": "http.response.body", "body": b"o", "more_body": True})
        while (await receive())["type"] != "http.disconnect":
            pass
    await send({"type": "http.response.body", "body": b"ok"})


class Site:
    """A server on loopback, by TLS where there is an authority; `counters` are those of its connections."""

    def __init__(self, port: int, authority: Path | None) -> None:
        self.port = port
        self.counters: Counter[str] = Counter()
        self._context = ssl.create_default_context(cafile=authority) if authority else None

    async def connect(self, source: str = "127.0.0.1", **secure: Any) -> Stream:
        """A connection from this address, silent so far."""
        return await asyncio.open_connection("127.0.0.1", self.port, local_addr=(source, 0), **secure)

    async def answers(self, source: str = "127.0.0.1") -> bool:
        """Return whether a request on a connection of its own is answered."""
        try:
            reader, writer = await self.connect(source, **({"ssl": self._context} if self._context else {}))
        except ConnectionError:
            return False
        try:
            writer.write(REQUEST)
            return (await reader.read(100)).startswith(b"HTTP/1.1 200")
        except ConnectionError:
            return False
        finally:
            writer.close()


@asynccontextmanager
async def serving(authority: Authority | None = None) -> AsyncIterator[Site]:
    """A site, until the end."""
    files = authority.sign("console") if authority else ()
    secure: dict[str, Any] = dict(zip(("ssl_certfile", "ssl_keyfile"), files, strict=False))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(
            _app, http="h11", ws="none", lifespan="off", log_level="error", timeout_graceful_shutdown=1, **secure
        )
        site = Site(listener.getsockname()[1], authority.certificate if authority else None)
        server = Server(config, OpenConnections(site.counters))
        running = asyncio.create_task(server.serve([listener]))
        try:
            yield site
        finally:
            server.end()
            await running


def on_site(test: Callable[[Site], Awaitable[None]], authority: Authority | None = None) -> None:
    """Run this with a site."""

    async def run() -> None:
        async with asyncio.timeout(60), serving(authority) as site:
            await test(site)

    asyncio.run(run())


async def ended(reader: asyncio.StreamReader) -> None:
    """Wait for the end of a connection, however it comes."""
    try:
        while await reader.read(1000):
            pass
    except ConnectionError:
        pass


async def drip(writer: asyncio.StreamWriter, text: bytes) -> None:
    """Send this again and again, a little at a time."""
    while not writer.is_closing():
        writer.write(text)
        await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("begun", "more"),
    [
        (b"", b""),
        (b"GET / HT", b""),
        (b"GET / HTTP/1.1\r\nx: ", b"y"),
        (b"POST /body HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999999\r\n\r\n", b"y"),
        (REQUEST, b"G"),
    ],
    ids=["nothing", "a part", "a header that goes on", "a body that goes on", "a second one"],
)
def test_whose_request_is_not_complete_in_time_is_cut(
    monkeypatch: pytest.MonkeyPatch, begun: bytes, more: bytes
) -> None:
    """A connection ends when a request, the first or a later one, does not come, or goes on and on; it is counted."""
    monkeypatch.setattr(connections, "REQUEST_SECONDS", 0.05)

    async def test(site: Site) -> None:
        reader, writer = await site.connect()
        writer.write(begun)
        dripping = asyncio.create_task(drip(writer, more)) if more else None
        await ended(reader)
        assert site.counters == {"connections_expired": 1}
        if dripping:
            dripping.cancel()
        writer.close()

    on_site(test)


def test_an_answer_may_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page whose request came in time has its events for as long as it likes."""
    monkeypatch.setattr(connections, "REQUEST_SECONDS", 0.05)

    async def test(site: Site) -> None:
        page, writer = await site.connect()
        writer.write(REQUEST.replace(b"/ ", b"/lasting "))
        await page.readuntil(b"\r\n\r\no")
        late, other = await site.connect()
        await ended(late)  # later than it, and gone
        assert site.counters == {"connections_expired": 1}
        assert not page.at_eof()
        writer.close()
        other.close()

    on_site(test)


@pytest.mark.parametrize("secure", [False, True])
def test_one_address_leaves_room_for_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, secure: bool) -> None:
    """Silent connections of one address, in a handshake too, keep no other from an answer; those that end make room."""
    monkeypatch.setattr(connections, "MAX_OF_ORIGIN", 3)

    async def test(site: Site) -> None:
        async with AsyncExitStack() as held:
            for _ in range(3):
                held.callback((await site.connect())[1].close)
            assert not await site.answers()
            assert site.counters == {"connections_refused": 1}
            assert await site.answers("127.0.0.2")
        while not await site.answers():
            await asyncio.sleep(0.01)

    on_site(test, Authority(tmp_path) if secure else None)


def test_all_addresses_leave_room_for_one_that_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections of all addresses together have a limit; the log names the address that is refused."""
    monkeypatch.setattr(connections, "MAX_OPEN", 4)

    async def test(site: Site) -> None:
        async with AsyncExitStack() as held:
            for number in range(4):
                _, writer = await site.connect(f"127.0.0.{number + 1}")
                held.callback(writer.close)
            with capture_logs() as logs:
                assert not await site.answers("127.0.0.9")
            assert site.counters == {"connections_refused": 1}
            (line,) = logs
            assert line["event"] == "connection closed at once, as too many are open"
            assert line["origin"] == "127.0.0.9"

    on_site(test)


def test_without_a_descriptor_to_spare_it_tries_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed accept is a line in the log, and clients that came meanwhile are answered."""
    monkeypatch.setattr(acceptor, "RETRY_SECONDS", 0.01)
    failing = [OSError(errno.EMFILE, "Too many open files"), ConnectionAbortedError()]

    async def test(site: Site) -> None:
        loop = asyncio.get_running_loop()
        accept = loop.sock_accept

        async def sock_accept(listener: socket.socket) -> Any:
            if failing:
                raise failing.pop()
            return await accept(listener)

        monkeypatch.setattr(loop, "sock_accept", sock_accept)
        with capture_logs() as logs:
            assert await site.answers()  # accepted before
            assert await site.answers()
        assert [(line["event"], line["reason"]) for line in logs] == [
            ("connections can't be accepted for now", "Too many open files")
        ]

    on_site(test)
