"""Places of collectors that the NATS server does not take, on a real one."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from services.gateway.cluster.keys import stream_name, subject_of
from services.gateway.cluster.member import Member
from services.gateway.registry.changes import never_keep
from services.gateway.registry.reached_places import Past
from services.gateway.registry.registry import Registry
from shared.client import MAX_PLACES, Place
from shared.settings.model import Settings
from shared.settings.uplink import Uplink
from tests.services.gateway.cluster.test_replica import NoCache
from tests.services.uplink.nats import NatsServer

pytestmark = pytest.mark.usefixtures("lab")
PLACES = tuple(Place(f"stream-{number}", "ingest.1", 7, 1, 2, 3) for number in range(MAX_PLACES))
LARGE = ("large", "larger")


def test_a_place_that_the_server_refuses_keeps_no_other_one_back(tmp_path: Path) -> None:
    """A refusal of any number is said once; they are tried again, and the connection and other places go on."""

    async def work(server: NatsServer) -> None:
        own = Uplink(servers=(server.address,), site="a", registry="of-test", replicas=1)
        cache: Any = NoCache()
        loop = asyncio.get_running_loop()
        member = Member(Settings(uplink=own), Registry(loop.time, 1, never_keep, 60.0), cache, 1)
        member.begin()
        try:
            async with asyncio.timeout(60):
                await member.changes.available.wait()
                assert member.changes.log is not None
                client, stream = member.changes.log._client, stream_name("of-test")

                async def take(most_bytes: int) -> None:
                    info = json.loads((await client.request(f"$JS.API.STREAM.INFO.{stream}")).data)
                    config = info["config"] | {"max_msg_size": most_bytes}
                    answer = await client.request(f"$JS.API.STREAM.UPDATE.{stream}", json.dumps(config).encode())
                    assert "error" not in json.loads(answer.data)

                async def kept(name: str) -> None:
                    asked = json.dumps({"last_by_subj": subject_of("of-test", f"past.{name}")}).encode()
                    while not (await client.request(f"$JS.API.DIRECT.GET.{stream}", asked)).data:
                        await asyncio.sleep(0.05)

                await take(1000)
                for names in (("large", "larger", "small"), ("other",)):
                    member.keep_pasts({
                        name: Past("", 1, 5, ("messages",), PLACES if name in LARGE else ()) for name in names
                    })  # fmt: skip
                    await kept(names[-1])
                assert member.changes.log is not None
                assert member.changes.log._client is client
                await take(-1)
                for name in LARGE:
                    await kept(name)
                while member._troubles.now:
                    await asyncio.sleep(0.05)
        finally:
            await member.end()

    with NatsServer(tmp_path) as server, capture_logs() as lines:
        asyncio.run(work(server))
    said = [line["event"] for line in lines]
    assert said[0] == "takes part in the cluster's registry"
    (refused,) = [each for each in said if each.endswith(": places that collectors have reached are not kept")]
    assert "message size exceeds maximum allowed" in refused
    assert "places that collectors have reached are all kept again" in said
