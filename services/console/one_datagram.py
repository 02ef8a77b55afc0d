"""One datagram, on request: the next that a stream brings, or that an exporter sends, or that a collector gets.

The stream is subscribed to until it has come, five seconds at most. That costs its batches of that time, once more.
"""

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import closing
from importlib import import_module
from typing import Any, Final

import zmq

from shared.bus.endpoint import BusLink
from shared.bus.messages import datagrams_topic
from shared.bus.zmq_sockets import Subscriber
from shared.client import Client
from shared.settings.tables import Bus

WAIT_SECONDS: Final = 5.0
AT_ONCE: Final = 4
"""Requests at a time; others wait."""


class Sampler:
    """Gets single datagrams from the bus."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], bus: Bus, link: BusLink) -> None:
        self._context = context
        self._bus = bus
        self._link = link
        self._turn = asyncio.Semaphore(AT_ONCE)

    async def next_datagram(
        self,
        clients: Mapping[str, Client],
        *,
        stream: str | None,
        collector: str | None,
        exporter: str | None,
        streams: Sequence[str],
    ) -> dict[str, Any]:
        """Return the next datagram as values for JSON; `error` says why there is none."""
        wanted = [stream] if stream else list(streams)
        sources = [[exporter]] if exporter else []
        if collector is not None:
            if (client := clients.get(collector)) is None:
                return {"error": "no such collector is signed up"}
            wanted = [each for each in wanted if client.wants(each)]
            sources += [list(client.prefixes)] if client.prefixes else []
        if not set(wanted) & set(streams):
            return {"error": "no such stream has reported"}
        async with self._turn:
            return await self._wait(wanted, sources)

    async def _wait(self, streams: Sequence[str], sources: Sequence[Sequence[str]]) -> dict[str, Any]:
        search = await asyncio.to_thread(import_module, "services.console.datagram_search")  # with numpy: a moment
        bus = self._bus
        try:
            wanted = search.matching(sources)
        except ValueError:
            return {"error": "the exporter is not an IP address"}
        with closing(
            Subscriber(self._context, bus.path, bus.high_water_mark, self._link, search.Borrower)
        ) as subscriber:
            for stream in streams:
                subscriber.subscribe(datagrams_topic(stream))
            found = await search.first_datagram(subscriber.receive, wanted, WAIT_SECONDS)
        return found or {"error": f"no such datagram came within {WAIT_SECONDS:g} s"}
