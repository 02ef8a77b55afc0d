"""A search of the bus for one datagram; apart from `one_datagram`, as it loads numpy."""

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import numpy as np

from services.console.dissection import dissect
from shared.bus.loans.borrower import Borrower as Borrower
from shared.bus.messages import Message
from shared.datagrams.prefix_set import Prefixes, halves_of

LOOK_SECONDS: Final = 0.02
MAX_SHOWN: Final = 2048
"""Bytes of a datagram that are shown."""


def matching(sources: Iterable[Iterable[str]]) -> list[Prefixes]:
    """Return sets of prefixes, each to match a source; ValueError when one is none."""
    return [Prefixes(each) for each in sources]


async def first_datagram(
    receive: Callable[[], Message | None], wanted: Sequence[Prefixes], seconds: float
) -> dict[str, Any] | None:
    """Return the first datagram whose source is in each of these sets; None: none came within `seconds`.

    Others have a turn after each message, however many there are.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        message = receive()
        if message and (found := _pick(message, wanted)):
            return found
        await asyncio.sleep(0 if message else LOOK_SECONDS)
    return None


def _pick(message: Message, wanted: Sequence[Prefixes]) -> dict[str, Any] | None:
    batch = message.batch
    if not batch:
        return None
    halves = halves_of(batch)
    rows = np.full(len(batch), True)
    for each in wanted:
        rows &= each.match(halves)
    if not rows.any():
        return None
    row = int(rows.argmax())
    address, port, payload = next(batch.part(row, row + 1).datagrams())
    shown = payload[:MAX_SHOWN]
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
