"""One datagram, on request: the next that a stream brings, or that an exporter sends, or that a collector gets.

The stream is subscribed to until it has come, five seconds at most. That costs its batches of that time, once more.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from importlib import import_module
from typing import Any, Final

import zmq

from services.console.dissection import dissect
from shared.bus.endpoint import BusLink
from shared.bus.messages import Message, datagrams_topic
from shared.bus.zmq_sockets import Subscriber
from shared.client import Client
from shared.monitoring.shares import covers
from shared.settings.tables import Bus

WAIT_SECONDS: Final = 5.0
MAX_SHOWN: Final = 2048
"""Bytes of a datagram that are shown."""
AT_ONCE: Final = 4
"""Requests at a time; others wait."""
LOOK_SECONDS: Final = 0.02


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
        prefixes: tuple[str, ...] = ()
        if collector is not None:
            if (client := clients.get(collector)) is None:
                return {"error": "no such collector is signed up"}
            wanted = [each for each in wanted if client.wants(each)]
            prefixes = client.prefixes
        if not set(wanted) & set(streams):
            return {"error": "no such stream has reported"}

        def is_wanted(address: str) -> bool:
            return (exporter is None or address == exporter) and (not prefixes or covers(prefixes, address))

        async with self._turn:
            return await self._wait(wanted, is_wanted)

    async def _wait(self, streams: Sequence[str], is_wanted: Callable[[str], bool]) -> dict[str, Any]:
        # With numpy, which takes a moment.
        lent = await asyncio.to_thread(import_module, "shared.bus.loans.borrower")
        bus = self._bus
        deadline = time.monotonic() + WAIT_SECONDS
        with closing(Subscriber(self._context, bus.path, bus.high_water_mark, self._link, lent.Borrower)) as subscriber:
            for stream in streams:
                subscriber.subscribe(datagrams_topic(stream))
            while time.monotonic() < deadline:
                while message := subscriber.receive():
                    if found := _pick(message, is_wanted):
                        return found
                await asyncio.sleep(LOOK_SECONDS)
        return {"error": f"no such datagram came within {WAIT_SECONDS:g} s"}


def _pick(message: Message, is_wanted: Callable[[str], bool]) -> dict[str, Any] | None:
    batch = message.batch
    if batch is None:
        return None
    for address, port, payload in batch.datagrams():
        if is_wanted(address):
            shown = bytes(payload[:MAX_SHOWN])
            return {
                "stream": batch.stream,
                "worker": message.envelope.sender,
                "received": batch.received_ns / 1e9,
                "address": address,
                "port": port,
                "length": len(payload),
                "hex": shown.hex(),
                "header": dissect(shown),
            }
    return None
