import asyncio
import os
from itertools import islice, pairwise
from pathlib import Path

import nkeys
import pytest

from shared.nats.connection import OWN_TRIES, CarefulClient, ConnectError, open_connection, rotated
from shared.settings.uplink import Uplink

SERVERS = tuple(f"nats://127.0.0.1:{port}" for port in (1, 2, 3))


def tried(nodes: tuple[str, ...]) -> list[int]:
    """The ports of the servers that are tried first."""
    uplink = Uplink(servers=SERVERS, site="a", nodes=nodes)
    return [each.port for each in islice(rotated(uplink), 2 * (OWN_TRIES + 1))]


def test_a_site_tries_all_servers_in_turn() -> None:
    """Servers are tried in turn, from any of them on: that of the site's own choice is as good as the others."""
    assert all(later == earlier % 3 + 1 for earlier, later in pairwise(tried(())))
    assert {tried(())[0] for _ in range(100)} == {1, 2, 3}


def test_a_node_prefers_its_own_server() -> None:
    """A node tries the server that its settings name first again and again, and each other one in between."""
    assert tried(("a", "b")) == [*[1] * OWN_TRIES, 2, *[1] * OWN_TRIES, 3]


async def tried_at(info: bytes, scheme: str, nkey: Path) -> tuple[str, bytes]:
    """Connect to a server that begins with these bytes; return why that failed, and what the server was sent."""
    sent = b""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(info)
        while line := await reader.readline():
            sent += line
            if line == b"PING\r\n":
                writer.write(b"PONG\r\n")
        writer.close()

    async def ignore(*_: Exception) -> None:
        """Do nothing."""

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        uplink = Uplink(servers=(f"{scheme}://127.0.0.1:{port}",), site="a", nkey=str(nkey))
        with pytest.raises(ConnectError) as refused:
            await open_connection(CarefulClient(), uplink, uplink.endpoints[0], ignore, ignore, 5)
        return str(refused.value), sent


@pytest.fixture
def nkey(tmp_path: Path) -> Path:
    """A file with the seed of an nkey."""
    path = tmp_path / "a.nk"
    path.write_bytes(nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER))
    path.chmod(0o600)
    return path


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        (b"INFO\r\n", ""),
        (b"INFO []\r\n", ""),
        (b"INFO " + b"x" * 100_000 + b"\r\n", " limit"),
        (b'INFO {"connect_urls":["[::"]}\r\n', "Invalid IPv6 URL"),
        (b'INFO {"connect_urls":5}\r\n', ""),
        (b'INFO {"max_payload":"large"}\r\n', "it tells no max_payload"),
        (b'INFO {"version":"of mine"}\r\n', "not a valid Semantic Version"),
    ],
)
def test_what_a_server_says_ends_no_more_than_the_attempt(info: bytes, expected: str, nkey: Path) -> None:
    """An attempt to connect to a server that makes no sense fails with a reason, and the next one may come."""
    told, _ = asyncio.run(tried_at(info, "nats", nkey))
    assert told.startswith("can't connect to nats://127.0.0.1:")
    assert expected in told


def test_nothing_is_proved_before_tls(nkey: Path) -> None:
    """A host before the server that says there is no TLS gets no signature, which it could show the server."""
    info = b'INFO {"version":"2.15.1","max_payload":1048576,"auth_required":true,"nonce":"of the server"}\r\n'
    told, sent = asyncio.run(tried_at(info, "tls", nkey))
    assert told.endswith("it does not ask for TLS; set tls in the server's settings")
    assert sent == b""
