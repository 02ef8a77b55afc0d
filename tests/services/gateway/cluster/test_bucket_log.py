"""The bucket as a log, on a real server: found or made, written on a condition, followed, and with no more rights."""

import asyncio
import json
import time
import tomllib
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from nats.aio.client import Client

from services.gateway.cluster.bucket_log import BucketLog, LogError, OvertakenError, Write
from services.gateway.cluster.keys import subject_of
from shared.nats.connection import CarefulClient, open_connection
from shared.settings.uplink import Uplink
from tests.certificates import Authority
from tests.documents import block
from tests.services.uplink.nats import NatsServer
from tests.services.uplink.test_session import seed_and_key

pytestmark = pytest.mark.usefixtures("lab")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    """A server, on loopback."""
    with NatsServer(tmp_path_factory.mktemp("plain")) as server:
        yield server


def with_log(
    server: NatsServer, work: Callable[[BucketLog], Coroutine[Any, Any, object]], registry: str = "berlin", **more: Any
) -> list[str]:
    """Work with a log by a connection of its own; return what the server said to it meanwhile."""
    said: list[str] = []

    async def run() -> None:
        client = CarefulClient()
        settings = {"servers": [server.address], "site": "berlin-1", "registry": registry, **more}
        uplink = msgspec.convert(settings, Uplink)

        async def ended() -> None:
            """Do nothing."""

        async def failed(error: Exception) -> None:
            said.append(str(error))

        await open_connection(client, uplink, uplink.endpoints[0], ended, failed, 5)
        try:
            await work(BucketLog(client, registry, f"_INBOX_{uplink.site}.test"))
        finally:
            await client.close()

    asyncio.run(run())
    return said


async def follow(log: BucketLog, after: int = 0) -> list[tuple[int, str, bytes]]:
    """Return what there is behind a position."""
    came: list[tuple[int, str, bytes]] = []
    caught_up = asyncio.Event()
    task = asyncio.create_task(log.follow(after, lambda *each: came.append(each[:3]), caught_up.set))
    async with asyncio.timeout(30):
        await caught_up.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return came


def test_a_log_is_written_on_a_condition(server: NatsServer) -> None:
    """Records are written together or not at all, by who knows the last one; each key keeps its last one, in order."""

    async def work(log: BucketLog) -> None:
        assert await log.open(1, create=True) == 0
        assert await log.write([Write("list.client.a", b"1")], 0) == 1
        assert await log.write([Write("session.x", b"1")], 0, "session.x") == 2
        assert (
            await log.write([Write("list.client.b", b"2"), Write("list.client.c", b"3"), Write("past.c", b"4")], 1) == 5
        )
        for writes in ([Write("list.client.d", b"5")], [Write("list.client.d", b"5"), Write("list.client.a", b"6")]):
            with pytest.raises(OvertakenError) as overtaken:
                await log.write(writes, 1)
            assert str(overtaken.value) == "another record is at position 4"
        assert await log.write([Write("list.client.a", b"7")], 4) == 6
        await log.put(Write("past.c", b"8"))
        assert await follow(log) == [
            (2, "session.x", b"1"),
            (3, "list.client.b", b"2"),
            (4, "list.client.c", b"3"),
            (6, "list.client.a", b"7"),
            (7, "past.c", b"8"),
        ]
        assert await follow(log, 6) == [(7, "past.c", b"8")]
        assert await follow(log, 7) == []

    assert with_log(server, work) == []


def test_a_message_of_another_subject_has_no_key_of_ours(server: NatsServer) -> None:
    """A message in the bucket that has another subject, as a consumer can hand on there, does not pass for a record."""

    async def work(log: BucketLog) -> None:
        config = {"name": log.stream, "subjects": [subject_of("odd", ">"), "other.>"]}
        await log._client.request(f"$JS.API.STREAM.CREATE.{log.stream}", json.dumps(config).encode())
        subject = "other.".ljust(len(subject_of("odd", "")), "x") + "list.client.a"
        await log._client.request(subject, b"1")
        assert [key for _, key, _ in await follow(log)] == [subject]

    assert with_log(server, work, "odd") == []


def test_records_tell_when_they_were_stored(server: NatsServer) -> None:
    """Each record comes with the time at which the server has stored it, however late it is read."""

    async def work(log: BucketLog) -> None:
        await log.open(1, create=True)
        before = time.time()
        await log.write([Write("past.a", b"1")], 0, "past.a")
        after = time.time()
        for _ in range(2):
            at = asyncio.get_running_loop().create_future()
            task = asyncio.create_task(log.follow(0, lambda *each: at.set_result(each[3]), lambda: None))  # noqa: B023
            async with asyncio.timeout(30):
                assert before <= await at <= after
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    assert with_log(server, work, "timed") == []


def test_a_record_may_end_by_itself(server: NatsServer) -> None:
    """A record with a time to live is gone after it; one that is written anew in time is not."""

    async def work(log: BucketLog) -> None:
        await log.open(1, create=True)
        await log.write([Write("session.x", b"1", 2)], 0, "session.x")
        await log.write([Write("session.x", b"2", 60)], 1, "session.x")
        await log.write([Write("session.y", b"3", 1)], 0, "session.y")
        while len(await follow(log)) > 1:
            await asyncio.sleep(0.1)
        await asyncio.sleep(1.5)
        assert [data for _, _, data in await follow(log)] == [b"2"]
        await log.write([Write("session.x", b"4", 1)], 2, "session.x")
        while await follow(log):
            await asyncio.sleep(0.1)

    with_log(server, work, "ending")


def test_what_ends_while_it_is_read_is_not_waited_for(server: NatsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A follower has caught up once the server has no more, though there were more when it began."""

    async def work(log: BucketLog) -> None:
        await log.open(1, create=True)
        await log.write([Write("list.client.a", b"1")], 0)
        ask = log._ask

        async def told_one_more(what: str, body: dict[str, object] | None = None) -> Any:
            answer = await ask(what, body)
            return msgspec.structs.replace(answer, num_pending=answer.num_pending + 1)

        monkeypatch.setattr(log, "_ask", told_one_more)
        assert await follow(log) == [(1, "list.client.a", b"1")]

    with_log(server, work, "shrinking")


def test_a_closed_connection_is_told_as_trouble(server: NatsServer) -> None:
    """A connection that ends just before the log is followed is a trouble like any other, and no fault of ours."""

    async def work(log: BucketLog) -> None:
        await log.open(1, create=True)
        await log._client.close()
        with pytest.raises(LogError, match="can't be followed: connection closed"):
            await log.follow(0, lambda *_: None, lambda: None)

    with_log(server, work)


def test_a_bucket_is_looked_at(server: NatsServer) -> None:
    """A bucket that is missing is made only where that is wanted; what is wrong with one that is there is told."""

    async def missing(log: BucketLog) -> None:
        with pytest.raises(LogError, match="there is no bucket KV_fanwire-wrong in JetStream; make it, or set create"):
            await log.open(1, create=False)

    with_log(server, missing, "wrong")

    async def make() -> None:
        client = Client()
        await client.connect(server.address)
        config = {
            "name": "KV_fanwire-wrong",
            "subjects": ["$KV.fanwire-wrong.>"],
            "storage": "memory",
            "max_age": 86_400_000_000_000,
        }
        answer = await client.request("$JS.API.STREAM.CREATE.KV_fanwire-wrong", json.dumps(config).encode(), 5)
        assert "error" not in json.loads(answer.data)
        await client.close()

    asyncio.run(make())

    async def found(log: BucketLog) -> None:
        await log.open(3, create=True)
        assert log.faults == [
            "bucket KV_fanwire-wrong has 1 replicas, and [uplink] replicas says 3",
            "bucket KV_fanwire-wrong is kept in memory alone: it is lost when its servers restart",
            "bucket KV_fanwire-wrong needs history 1, allow_msg_ttl and allow_atomic; make it anew",
            "bucket KV_fanwire-wrong drops entries that are old: let it have no max_age, and discard: new",
        ]
        with pytest.raises(LogError, match=r"KV_fanwire-wrong can't be written: .*TTL"):
            await log.write([Write("list.client.a", b"1", 1)], 0)

    with_log(server, found, "wrong")


def test_a_server_that_stands_still_is_noticed(tmp_path: Path) -> None:
    """A follower of a log hears within some seconds that nothing comes any more, though the connection is open."""
    with NatsServer(tmp_path) as server:

        async def work(log: BucketLog) -> None:
            await log.open(1, create=True)
            caught_up = asyncio.Event()
            task = asyncio.create_task(log.follow(0, lambda *_: None, caught_up.set))
            await caught_up.wait()
            server.freeze()
            with pytest.raises(LogError, match="can't be followed: no server sends it any more"):
                await task
            with pytest.raises(LogError, match="can't be written"):
                await log.write([Write("list.client.a", b"1")], 0)

        try:
            with_log(server, work)
        finally:
            server.stop()


def test_the_permissions_of_the_page_are_enough(tmp_path: Path) -> None:
    """With the settings and permissions of the page a gateway makes its bucket, and may write no other subjects."""
    authority = Authority(tmp_path)
    certificate, key = authority.sign("nats")
    seed, public = seed_and_key()
    nkey = tmp_path / "berlin-1.nk"
    nkey.write_text(f"{seed}\n")
    nkey.chmod(0o600)
    rights = block("services/gateway/README.md", "registry-permissions")
    settings = tomllib.loads(block("services/gateway/README.md", "cluster-registry"))["uplink"]
    text = (
        f'jetstream {{ store_dir: "{tmp_path}/jetstream" }}\ntls {{ cert_file: "{certificate}", key_file: "{key}" }}\n'
        "accounts { fanwire { jetstream: enabled\n"
        f'users: [ {{ nkey: "{public}", permissions: {{ {rights} }} }} ] }} }}\n'
    )
    more = {"nkey": str(nkey), "authority": str(authority.certificate)}
    assert settings["registry"] == "berlin"
    with NatsServer(tmp_path, text, "tls") as server:

        async def work(log: BucketLog) -> None:
            assert await log.open(1, create=True) == 0
            assert await log.write([Write("list.client.a", b"1"), Write("past.a", b"2")], 0) == 2
            assert len(await follow(log)) == 2

        assert with_log(server, work, **more) == []

        async def elsewhere(log: BucketLog) -> None:
            with pytest.raises(LogError):
                await log.write([Write("list.client.a", b"1")], 0)

        (said,) = with_log(server, elsewhere, "bonn", **more)
        assert "ermissions" in said
