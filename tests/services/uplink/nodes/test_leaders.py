import asyncio
import signal
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from nats.errors import Error as NatsError

from services.uplink.nodes import leaders
from services.uplink.outgoing.outbox import Outbox
from services.uplink.session import Session
from shared.nats.troubles import Troubles
from shared.settings.uplink import Uplink
from tests.services.uplink.nats import NatsCluster

pytestmark = pytest.mark.usefixtures("lab")
PATIENCE_SECONDS = 60.0


async def open_session(addresses: list[str], at: int) -> Session:
    """A connection of node `a` to one of these servers, of which the first is its own."""
    uplink = Uplink(servers=tuple(addresses), site="a", nodes=("a", "b"), replicas=3, keep_bytes=1 << 24)
    session = Session(uplink, Outbox(1 << 20, 1, lambda _: Counter(), time.monotonic), Counter(), Troubles())
    return await session.open(uplink.endpoints[at])


async def come_true(condition: Any, what: str) -> None:
    """Wait until a coroutine returns true; JetStream may not answer for a while."""
    deadline, come = time.monotonic() + PATIENCE_SECONDS, False
    while not come:
        assert time.monotonic() < deadline, what
        with suppress(NatsError):
            come = await condition()
        await asyncio.sleep(0.05)


def test_a_nodes_own_server_leads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node's stream and the consumer of another node, which other servers lead, go to the node's own server."""
    monkeypatch.setattr(leaders, "LOOK_SECONDS", 0.1)

    async def lead(addresses: list[str]) -> None:
        session = await open_session(addresses, 0)
        manager = session.client.jsm(timeout=2)

        async def are_made() -> bool:
            await manager.add_stream(name="fanwire-a", subjects=["fanwire.a.>"], num_replicas=3)
            await manager.add_consumer("fanwire-a", durable_name="to-b")
            return True

        async def led_by() -> set[str | None]:
            groups = [(await manager.stream_info("fanwire-a")).cluster]
            groups.append((await manager.consumer_info("fanwire-a", "to-b")).cluster)
            return {group.leader if group else "" for group in groups}

        async def another_leads() -> bool:
            for kind, name in (("STREAM", "fanwire-a"), ("CONSUMER", "fanwire-a.to-b")):
                wish = b'{"placement": {"preferred": "n1"}}'
                await session.client.request(f"$JS.API.{kind}.LEADER.STEPDOWN.{name}", wish, timeout=2)
            return await led_by() == {"n1"}

        async def own_leads() -> bool:
            return await led_by() == {"n0"}

        await come_true(are_made, "a stream and a consumer are made")
        await come_true(another_leads, "another server leads")
        keeping = asyncio.create_task(leaders.keep_leaders(session))
        await come_true(own_leads, "the server of the node leads")
        session.ended.set()
        await keeping
        await session.close()

    with NatsCluster(tmp_path) as servers:
        asyncio.run(lead(servers.addresses))


def test_a_node_returns_to_its_own_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that uses another one's server leaves it once its own, which stood still, answers again."""
    monkeypatch.setattr(leaders, "LOOK_SECONDS", 0.1)

    async def go_home(servers: NatsCluster) -> None:
        own = servers.each[0]
        session = await open_session(servers.addresses, 1)
        own.freeze()
        assert own.process is not None
        returning = asyncio.create_task(leaders.return_home(session))
        await asyncio.sleep(0.5)
        own.process.send_signal(signal.SIGCONT)
        assert not session.ended.is_set()
        await asyncio.wait_for(returning, PATIENCE_SECONDS)
        assert session.ended.is_set()
        await session.close()

    with NatsCluster(tmp_path) as servers:
        asyncio.run(go_home(servers))
