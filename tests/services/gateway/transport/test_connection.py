"""A connection in asyncio's loop: what its handler does is the test's."""

import asyncio
import gc
import socket
from unittest.mock import patch

import pytest
from structlog.testing import capture_logs

from services.gateway.handler import Handler
from services.gateway.transport.connection import ClientConnection
from services.gateway.transport.open_connections import OpenConnections
from shared.process import memory
from shared.process.memory import Memory
from shared.settings.tables import Gateway
from tests.services.gateway.test_handler import Handling


def test_fault_of_ours_ends_its_connection_only() -> None:
    """An error that nobody expected is logged, its client's connection is cut, and the next client is answered."""

    async def run() -> list[bytes]:
        connections = OpenConnections(Handling().handler, Gateway(), 10, Memory())
        answers = []
        for line in (b'{"op":"streams"}\n', b'{"op":"list"}\n'):
            ours, theirs = socket.socketpair()
            await connections.loop.connect_accepted_socket(lambda: ClientConnection(connections), ours)
            reader, writer = await asyncio.open_connection(sock=theirs)
            writer.write(b'{"op":"nonsense"}\n' + line)
            answers.append(await reader.readline() + await reader.readline())
            writer.close()
        return answers

    inform = Handler._inform

    def fail(handler: Handler, request: object, *rest: object) -> object:
        if "Streams" in type(request).__name__:
            raise KeyError("streams")
        return inform(handler, request, *rest)  # type: ignore[arg-type]

    with patch.object(Handler, "_inform", fail), capture_logs() as logs:
        first, second = asyncio.run(asyncio.wait_for(run(), 30))
    assert [(each["event"], each["reason"]) for each in logs] == [
        ("error while handling a request", "KeyError('streams')")
    ]
    assert (first.count(b"\n"), second.count(b"\n"), b'"clients"' in second) == (1, 2, True)


def test_fault_while_others_are_told_ends_its_connection_only() -> None:
    """A line that is pushed to a client fails: its connection is cut, and whoever pushes goes on."""

    async def run() -> bytes:
        handling = Handling()
        connections = OpenConnections(handling.handler, Gateway(), 10, Memory())
        ours, theirs = socket.socketpair()
        await connections.loop.connect_accepted_socket(lambda: ClientConnection(connections), ours)
        reader, writer = await asyncio.open_connection(sock=theirs)
        (push,) = handling.handler._pushes.values()
        with patch.object(ClientConnection, "_perform", side_effect=KeyError("push")):
            push(b"{}\n")
        try:
            return await reader.read()
        except ConnectionResetError:
            return b""
        finally:
            writer.close()

    with capture_logs() as logs:
        assert asyncio.run(asyncio.wait_for(run(), 30)) == b""
    assert [each["reason"] for each in logs] == ["KeyError('push')"]


class Waiting:
    """A connection for which something waits."""

    def __init__(self, connections: OpenConnections) -> None:
        self._of, self._bytes = connections._open, b"x" * 60_000

    @property
    def buffered(self) -> int:
        """All of it."""
        return len(self._bytes)

    def drop(self) -> None:
        """Release it."""
        self._bytes = b""
        self._of.discard(self)


@pytest.mark.skipif(memory._trim is None, reason="this C library returns freed memory by itself")
def test_those_that_are_cut_for_memory_are_no_more_than_half_if_that_is_enough() -> None:
    """The memory that they had counts as free before any others are cut."""
    assert memory._trim is not None
    gc.collect()
    memory._trim(0)  # what other tests of this process have freed is not to count

    async def run() -> int:
        measured = Memory()
        connections = OpenConnections(Handling().handler, Gateway(), 10, measured)
        connections._open |= {Waiting(connections) for _ in range(1000)}  # type: ignore[misc]
        measured.account()
        measured._full = measured.used - (16 << 20)
        measured.ceiling = measured.used
        for _ in range(10):
            measured._look_at = 0.0  # as 10 ms later
            connections.save_memory()
        return len(connections._open)

    assert asyncio.run(run()) == 500
