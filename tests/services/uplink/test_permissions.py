"""The permissions of the page at a real server: a site reads what it may, and writes nothing in another one's name."""

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import nats
import pytest
from nats.aio.client import Client
from nats.js.api import StreamConfig

from services.gateway.cluster.keys import stream_name, subject_of
from tests.services.uplink.test_session import Secured

pytestmark = pytest.mark.usefixtures("lab")
CREATE = "$JS.API.CONSUMER.CREATE.fanwire-berlin.to-bonn"
MINE, READ, KEPT = "fanwire.berlin.flows.*", "fanwire.berlin.flows.ingest-1", stream_name("r")


@pytest.fixture
def secured(tmp_path: Path) -> Iterator[Secured]:
    """A server with TLS and the permissions."""
    found = Secured(tmp_path)
    with found.server:
        yield found


@asynccontextmanager
async def connected(secured: Secured, site: str, refused: list[str]) -> AsyncIterator[Client]:
    """Connect as a site; note what the server refuses."""
    context = ssl.create_default_context(cafile=str(secured.authority))

    async def note(error: Exception) -> None:
        refused.append(str(error))

    client = await nats.connect(
        secured.server.address,
        nkeys_seed_str=secured.files[site].read_text().strip(),
        tls=context,
        inbox_prefix=f"_INBOX_{site}",
        error_cb=note,
    )
    try:
        yield client
    finally:
        await client.close()


async def make(client: Client, subject: str, filter_subject: str, **more: Any) -> dict[str, Any]:
    """Ask for the consumer `to-bonn` on a subject; return the answer."""
    config = {"name": "to-bonn", "durable_name": "to-bonn", "ack_policy": "none", "filter_subject": filter_subject}
    request = {"stream_name": "fanwire-berlin", "config": config | more}
    answer: dict[str, Any] = json.loads((await client.request(subject, json.dumps(request).encode(), 5)).data)
    return answer


def test_a_site_reads_the_stream_that_it_may_alone(secured: Secured) -> None:
    """By the permissions of the page a site makes a consumer of one stream, and none of another stream or of all."""

    async def work() -> None:
        refused: list[str] = []
        async with connected(secured, "admin", []) as admin, connected(secured, "bonn", refused) as bonn:
            await admin.jsm().add_stream(StreamConfig(name="fanwire-berlin", subjects=["fanwire.berlin.>"]))
            assert "error" in await make(bonn, f"{CREATE}.{MINE}", "fanwire.berlin.secret.*")
            assert "error" not in await make(bonn, f"{CREATE}.{MINE}", MINE)
            for subject in (CREATE, f"{CREATE}.fanwire.berlin.secret.*", CREATE.replace("to-bonn", f"more.{MINE}")):
                count, asking = len(refused), asyncio.create_task(make(bonn, subject, MINE))
                async with asyncio.timeout(30):
                    while len(refused) == count:
                        await asyncio.sleep(0.01)
                asking.cancel()
                await asyncio.gather(asking, return_exceptions=True)
                assert subject.lower() in refused[-1].lower()

    asyncio.run(work())


def test_a_consumer_writes_nothing_in_the_name_of_another_site(secured: Secured) -> None:
    """A consumer that hands on to a subject which its maker may not write keeps the subject that it has read from.

    So a stream or a bucket there has it under that one, and JetStream does not take it for a request.
    """
    elsewhere = ("fanwire.cologne.flows.ingest-1", subject_of("r", "meta"), "$JS.API.STREAM.DELETE.fanwire-cologne")
    streams = {"fanwire-berlin": "fanwire.berlin.>", "fanwire-cologne": "fanwire.cologne.>", KEPT: subject_of("r", ">")}

    async def work() -> None:
        async with connected(secured, "admin", []) as admin, connected(secured, "bonn", []) as bonn:
            manager = admin.jsm()
            for name, subject in streams.items():
                await manager.add_stream(StreamConfig(name=name, subjects=[subject]))
            await admin.request(READ, b"", 5)
            for subject in elsewhere:
                witness = await admin.subscribe(subject)  # without any the server hands on nothing
                await admin.flush()
                assert "error" not in await make(bonn, f"{CREATE}.{MINE}", MINE, deliver_subject=subject)
                assert (await witness.next_msg(30)).subject == READ
                await witness.unsubscribe()
                await bonn.request(CREATE.replace("CREATE", "DELETE"), b"", 5)
            for name in streams:
                asked = await admin.request(f"$JS.API.STREAM.INFO.{name}", b'{"subjects_filter": ">"}', 5)
                assert {*json.loads(asked.data)["state"].get("subjects", ())} <= {READ}

    asyncio.run(work())
