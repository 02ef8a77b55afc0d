"""The node's own NATS server: it leads the node's stream in JetStream, and the consumers by which others receive that.

With a server that dies its leaders go, and JetStream takes up to ten seconds to choose others. Nothing comes meanwhile
from a stream without a leader. So a node that dies takes with it only leaders of what it sent itself. A consumer that
is made anew is led where its stream is.
"""

import asyncio
from contextlib import suppress
from typing import Final

import msgspec
from nats.errors import Error as NatsError

from services.uplink.session import REQUEST_SECONDS, Session
from services.uplink.subjects import kept_stream
from shared.net.addresses import Endpoint

LOOK_SECONDS: Final = 10.0
"""Time between two looks at who leads; a server that has just started follows for a while first."""

FIRST_WORD: Final = b"INFO"


class Peer(msgspec.Struct):
    """A server that keeps a copy; `current`: it has all."""

    name: str
    current: bool = False


class Group(msgspec.Struct):
    """The servers of a stream or of a consumer; the leader is not among the `replicas`."""

    replicas: list[Peer] = []


class Info(msgspec.Struct):
    """JetStream's answer about a stream or a consumer, as far as it is of use here."""

    cluster: Group = msgspec.field(default_factory=Group)


_read_info: Final = msgspec.json.Decoder(Info).decode


async def keep_leaders(session: Session) -> None:
    """Let the server, which is this node's own, lead what it sends by, until the connection ends."""
    server = str(session.client._server_info.get("server_name"))
    own, stream = session.uplink.site, kept_stream(session.uplink.site)
    others = [f"{stream}.to-{node}" for node in session.uplink.nodes if node != own]
    groups = [("STREAM", stream), *(("CONSUMER", other) for other in others)]
    while not session.ended.is_set():
        for kind, name in groups:
            with suppress(NatsError, OSError, TimeoutError, msgspec.MsgspecError):  # it is tried again
                answer = await session.client.request(f"$JS.API.{kind}.INFO.{name}", b"", timeout=REQUEST_SECONDS)
                group = _read_info(answer.data).cluster
                if Peer(server, current=True) in group.replicas:
                    wish = msgspec.json.encode({"placement": {"preferred": server}})
                    subject = f"$JS.API.{kind}.LEADER.STEPDOWN.{name}"
                    await session.client.request(subject, wish, timeout=REQUEST_SECONDS)
        await session.wait(session.ended, LOOK_SECONDS)


async def return_home(session: Session) -> None:
    """End the connection, which is to another node's server, once this node's own answers."""
    home = session.uplink.endpoints[0]
    while not session.ended.is_set():
        await session.wait(session.ended, LOOK_SECONDS)
        if await _answers(home):
            session.ended.set()


async def _answers(server: Endpoint) -> bool:
    """Return whether a server says its first word; one that stands still lets others connect."""
    with suppress(OSError, TimeoutError):
        async with asyncio.timeout(REQUEST_SECONDS):
            reader, writer = await asyncio.open_connection(server.host, server.port)
            try:
                return await reader.read(len(FIRST_WORD)) == FIRST_WORD
            finally:
                writer.close()
    return False
