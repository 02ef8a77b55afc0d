"""A member of the cluster, on a log in memory: what waits for its session's next record, and leases meanwhile."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from services.gateway.admission.peer import Peer
from services.gateway.cluster import changes as module
from services.gateway.cluster.log import Write
from services.gateway.cluster.member import Member
from services.gateway.registry.changes import ignore, never_keep
from services.gateway.registry.entry import Entry, Origin
from services.gateway.registry.registry import Registry
from shared.client import Client
from shared.settings.model import Settings
from shared.settings.uplink import Uplink
from tests.services.gateway.cluster.test_replica import Log, NoCache


class Node:
    """A gateway's registry and membership, and a bucket that answers while `answers` is set."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log = Log()
        self.answers = asyncio.Event()
        self.registry = Registry(lambda: self.now, 1, never_keep, 60.0)
        settings = Settings(uplink=Uplink(servers=("nats://127.0.0.1:4222",), site="a", registry="of-test"))
        cache: Any = NoCache()
        self.member = Member(settings, self.registry, cache, 1)

    async def write(self, writes: Sequence[Write], _expected: int, _keys: str = "") -> int:
        """Write records, once the bucket answers, and let them come back."""
        await self.answers.wait()
        for each in writes:
            self.log.write(each.key, each.data)
        for record in self.log.since(self.member.replica.position):
            self.member.replica.receive(*record)
        return self.log.last

    def connect(self) -> asyncio.Task[None]:
        """Begin to keep the session, as a new connection does."""
        bucket: Any = self
        self.member.changes.log = bucket
        return asyncio.create_task(self.member._keep_session(bucket))

    def find(self) -> Entry:
        """Return the entry `mine`."""
        found = self.registry.find("mine")
        assert found is not None
        return found


def test_a_renewal_outlives_the_connection_that_it_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that renews when the connection ends gets its answer: by the next one, or `unavailable` in time."""
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 0.4)

    async def work() -> None:
        node = Node()
        changes = node.member.changes
        making = asyncio.create_task(changes.run())
        node.answers.set()
        session = node.connect()
        await changes.available.wait()
        client, peer = Client("mine", 0, "192.0.2.1", 9, streams=("messages",)), Peer(5, "192.0.2.1", 9)
        changes.make(lambda: node.registry.grant(client, peer, Origin.JSON, ttl=9.0), ignore, ignore)
        await until(lambda: node.registry.find("mine"))
        for healed in (True, False):
            node.answers.clear()
            said: list[object] = []
            changes.renew(node.find, said.append, said.append)
            await until(lambda: not changes.wanted.is_set())
            session.cancel()
            await asyncio.gather(session, return_exceptions=True)
            if healed:
                node.answers.set()
                session = node.connect()
            await until(lambda: said)  # noqa: B023
            assert isinstance(said[0], Entry if healed else OSError)
        making.cancel()
        await asyncio.gather(making, return_exceptions=True)

    asyncio.run(work())


async def until(condition: Any) -> None:
    """Wait until a condition holds."""
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.005)
