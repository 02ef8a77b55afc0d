"""A member of the cluster, on a log in memory: what waits for its session's next record, and leases meanwhile."""

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from services.gateway.admission.peer import Peer
from services.gateway.cluster import changes as module
from services.gateway.cluster import member as member_module
from services.gateway.cluster.bucket_log import LogError, OvertakenError, Write
from services.gateway.cluster.keys import LISTED, SESSION
from services.gateway.cluster.member import AGAIN_BEATS, SESSION_TTL_SECONDS, Member
from services.gateway.cluster.records import GONE_SECONDS, Gone, Identity, encode, key_of
from services.gateway.registry.changes import ignore, never_keep
from services.gateway.registry.entry import Entry, Origin
from services.gateway.registry.reached_places import Past
from services.gateway.registry.registry import Registry
from shared.client import Client
from shared.nats.connection import ConnectError
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

    async def has(self, key: str) -> bool:
        """Return whether there is a record under a key."""
        return key in self.log.kept

    def connect(self) -> asyncio.Task[None]:
        """Begin to keep the session, as a new connection does."""
        bucket: Any = self
        self.member.changes.log = bucket
        return asyncio.create_task(self.member._keep_session(bucket))

    async def enter(self) -> asyncio.Task[None]:
        """Connect, and enter `mine` with a lease of 9 s."""
        self.answers.set()
        session = self.connect()
        await self.member.changes.available.wait()
        client, peer = Client("mine", 0, "192.0.2.1", 9, streams=("messages",)), Peer(5, "192.0.2.1", 9)
        self.member.changes.make(lambda: self.registry.grant(client, peer, Origin.JSON, ttl=9.0), ignore, ignore)
        await until(lambda: self.registry.find("mine"))
        return session

    def find(self) -> Entry:
        """Return the entry `mine`."""
        found = self.registry.find("mine")
        assert found is not None
        return found


def run(work: Callable[[Node], Coroutine[Any, Any, None]]) -> None:
    """Do some work with a node that makes its changes meanwhile."""

    async def both() -> None:
        node = Node()
        making = asyncio.create_task(node.member.changes.run())
        await work(node)
        making.cancel()
        await asyncio.gather(making, return_exceptions=True)

    asyncio.run(both())


async def until(condition: Callable[[], object]) -> None:
    """Wait until a condition holds."""
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.005)


async def end(session: asyncio.Task[None]) -> None:
    """End a session as its connection ends."""
    session.cancel()
    await asyncio.gather(session, return_exceptions=True)


def test_a_renewal_outlives_the_connection_that_it_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that renews when the connection ends gets its answer: by the next one, or `unavailable` in time."""
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 0.4)

    async def work(node: Node) -> None:
        session, changes = await node.enter(), node.member.changes
        for healed in (True, False):
            node.answers.clear()
            said: list[object] = []
            changes.renew(node.find, said.append, said.append)
            await until(lambda: not changes.wanted.is_set())
            await end(session)
            if healed:
                node.answers.set()
                session = node.connect()
            await until(lambda: said)  # noqa: B023
            assert isinstance(said[0], Entry if healed else OSError)

    run(work)


def test_leases_begin_anew_once_they_can_be_renewed() -> None:
    """A lease that ran out while nobody could renew it lasts its whole time from when the registry can be written."""

    async def work(node: Node) -> None:
        session, changes = await node.enter(), node.member.changes
        for away, left in ((True, 1), (False, 0)):
            if away:
                await end(session)
                changes.lose()
            node.now += 9.0
            looked: list[object] = []
            changes.make(node.registry.expire, looked.append)
            if away:
                session = node.connect()
            await until(lambda: looked)  # noqa: B023
            assert len(node.registry) == left
        await end(session)

    run(work)


def test_servers_that_are_away_are_told_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """While no server can be reached, the log has one line for each, however often all are tried in turn."""
    monkeypatch.setattr(member_module, "RECONNECT_SECONDS", (0.0, 0.0))
    tried = 0

    async def refuse(_client: object, _uplink: object, endpoint: object, *_: object) -> None:
        nonlocal tried
        tried += 1
        raise ConnectError(f"can't connect to {endpoint}: refused")

    monkeypatch.setattr(member_module, "open_connection", refuse)

    async def work(node: Node) -> None:
        node.member._uplink = Uplink(servers=("nats://127.0.0.1:1", "nats://127.0.0.1:2"), site="a", registry="r")
        connecting = asyncio.create_task(node.member._stay_connected())
        await until(lambda: tried > 9)
        await end(connecting)

    with capture_logs() as lines:
        run(work)
    told = sorted(line["event"] for line in lines if "can't connect" in line["event"])
    assert told == [f"can't connect to nats://127.0.0.1:{port}: refused; trying again" for port in (1, 2)]


def test_a_fault_of_ours_ends_a_connection_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that nobody expected while a node takes part is logged, and the node connects again."""
    monkeypatch.setattr(member_module, "RECONNECT_SECONDS", (0.0, 0.0))
    tried = 0

    async def fail(*_: object) -> None:
        nonlocal tried
        tried += 1
        raise KeyError("odd")

    monkeypatch.setattr(member_module, "open_connection", fail)

    async def work(node: Node) -> None:
        connecting = asyncio.create_task(node.member._stay_connected())
        await until(lambda: tried > 2 or connecting.done())
        assert not connecting.done()
        await end(connecting)

    with capture_logs() as lines:
        run(work)
    assert {line["event"] for line in lines} == {"a fault has ended this node's part in the cluster"}


def test_a_secret_that_can_not_be_read_is_a_trouble(tmp_path: Path) -> None:
    """A file of credentials that is missing at a reconnection is told of; the gateway tries again and goes on."""

    async def work(node: Node) -> None:
        servers, missing = ("nats://127.0.0.1:1",), str(tmp_path / "none")
        node.member._uplink = Uplink(servers=servers, site="a", registry="r", nkey=missing)
        connecting = asyncio.create_task(node.member._stay_connected())
        await until(lambda: lines or connecting.done())
        assert not connecting.done()
        await end(connecting)

    with capture_logs() as lines:
        run(work)
    assert "No such file" in lines[0]["event"]


@pytest.mark.parametrize("away", [0.0, float(SESSION_TTL_SECONDS)])
def test_a_session_that_is_gone_too_soon_tells_of_an_older_bucket(away: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A session's record that is not there ends by itself after its time; before that, the bucket has lost it."""

    async def work(node: Node) -> None:
        await end(await node.enter())
        node.member._wrote_at -= away
        write, missing = node.write, [OvertakenError(0)]

        async def miss_once(writes: Sequence[Write], expected: int, keys: str = "") -> int:
            if missing and keys.startswith(SESSION):
                raise missing.pop()
            return await write(writes, expected, keys)

        monkeypatch.setattr(node, "write", miss_once)
        count = node.member._count
        session = node.connect()
        await until(lambda: session.done() or node.member._count > count + 1)
        assert session.done() == (not away)
        if session.done():
            with pytest.raises(LogError, match="the registry of the cluster has lost what it had"):
                await session
        await end(session)

    run(work)


@pytest.mark.parametrize("days", [None, 0, 1])
def test_a_list_that_is_gone_too_soon_is_written_anew(days: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records of the list that are not there any more were purged, unless the last one was the mark of an old end."""

    async def work(node: Node) -> None:
        session = await node.enter()
        if days is not None:
            at = time.time() - days * GONE_SECONDS
            gone = Gone(by=Identity("b", 2, 1), revision=0, name="other", generation=0)
            node.member.replica.receive(node.log.last + 1, key_of(gone), encode(gone), at)
        write, missing = node.write, [OvertakenError(0)]

        async def purge(writes: Sequence[Write], expected: int, keys: str = LISTED) -> int:
            if missing and keys == LISTED:
                raise missing.pop()
            return await write(writes, expected, keys)

        monkeypatch.setattr(node, "write", purge)
        answers: list[object] = []
        client, peer = Client("second", 0, "192.0.2.1", 8), Peer(5, "192.0.2.1", 9)
        node.member.changes.make(lambda: node.registry.grant(client, peer, Origin.JSON), answers.append, answers.append)
        await until(lambda: answers or session.done())
        await until(lambda: session.done() or days == 1)
        if days != 1:
            with pytest.raises(LogError, match="the registry of the cluster has lost what it had"):
                await session
        assert node.member._older == (days != 1)
        await end(session)

    run(work)


def test_an_entry_that_is_gone_from_the_log_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry that was purged by hand is missed though no record tells of it, and nothing else is written."""
    monkeypatch.setattr(member_module, "LOOK_SECONDS", 0.0)

    async def work(node: Node) -> None:
        session = await node.enter()
        count = node.member._count
        await until(lambda: session.done() or node.member._count > count + 1)
        assert not session.done()
        del node.log.kept["list.client.mine"]
        with pytest.raises(LogError, match="the registry of the cluster has lost what it had"):
            await session
        assert node.member._older

    run(work)


class Refusing:
    """A bucket that does not take some places."""

    def __init__(self) -> None:
        self.tried: list[str] = []

    async def put(self, write: Write) -> None:
        """Take a record, unless it is called so."""
        self.tried.append(write.key)
        if "refused" in write.key:
            raise LogError("the bucket can't be written")


def test_places_that_were_refused_are_tried_again_within_some_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each second a part of them, however many there are: one that the server takes again waits for few others."""
    monkeypatch.setattr(member_module, "BEAT_SECONDS", 3600.0)

    async def work(node: Node) -> None:
        bucket: Any = Refusing()
        past = Past("", 1, 5, ("messages",), ())
        count = 3 * AGAIN_BEATS
        writing = asyncio.create_task(node.member._write_pasts(bucket))
        node.member.keep_pasts({f"refused-{number}": past for number in range(count)})
        await until(lambda: len(bucket.tried) == count + 3)
        assert bucket.tried[count:] == bucket.tried[:3]
        await end(writing)

    run(work)


def test_a_new_place_does_not_wait_for_those_that_are_refused() -> None:
    """One that is new is the next to be written, however many places the server does not take."""

    async def work(node: Node) -> None:
        bucket: Any = Refusing()
        past = Past("", 1, 5, ("messages",), ())
        refused = {f"refused-{number}": past for number in range(9)}
        writing = asyncio.create_task(node.member._write_pasts(bucket))
        node.member.keep_pasts(refused)
        await until(lambda: {*bucket.tried} == {f"past.{name}" for name in refused})
        for new in ("one", "two"):
            tried = len(bucket.tried)
            node.member.keep_pasts(refused | {new: past})
            await until(lambda: len(bucket.tried) > tried)  # noqa: B023
            assert bucket.tried[tried] == f"past.{new}"
        await end(writing)

    run(work)


def test_a_server_that_refuses_is_told_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refusal of the server, and the record that is not there, are a line each, however often it is tried."""

    async def work(node: Node) -> None:
        async def refuse(*_: object) -> int:
            await node.member._note_error(OSError("permissions violation"))
            raise LogError("the bucket can't be written")

        monkeypatch.setattr(node, "write", refuse)
        with pytest.raises(LogError):
            await node.connect()

    with capture_logs() as lines:
        run(work)
    assert [line["event"] for line in lines] == [
        "the connection to the NATS server fails: permissions violation",
        "the bucket can't be written; nothing can be registered here meanwhile",
    ]
