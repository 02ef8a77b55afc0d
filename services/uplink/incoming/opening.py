"""The begin of receiving after a start: what nobody here can want yet stays in JetStream. No I/O.

A stream without a subscriber is dropped, and acknowledged. But at the start of a host the senders of copies subscribe
only once they have the registry. So nothing is fetched before.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Final

from shared.bus.messages import Status
from shared.ledger.counters import REVISION

SENDERS: Final = ("forwarder", "transmitter")
SUBSCRIBE_SECONDS: Final = 1.0
"""Time for subscriptions to come here, and for another sender to get the registry, after a report that tells of it."""
PATIENCE_SECONDS: Final = 30.0
"""Time after which a bus is taken for one without senders of copies."""


class Opening:
    """Sets `event` when fetching may begin."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.event = asyncio.Event()
        self.due_at = float("inf")
        """The time at which it is to be set."""
        self._clock = clock

    def note_report(self, service: str, status: Status) -> None:
        """Note what a service reports: a sender of copies tells which revision of the registry it has."""
        name = service.partition(".")[0]
        if name in SENDERS and REVISION in status.accounts.get(name, {}) and not self.event.is_set():
            self.due_at = min(self.due_at, self._clock() + SUBSCRIBE_SECONDS)

    def check(self, *, ready: bool) -> None:
        """Open if it is time to; not before the bus is `ready`."""
        if not ready:
            return
        self.due_at = min(self.due_at, self._clock() + PATIENCE_SECONDS)
        if self._clock() >= self.due_at:
            self.due_at = float("inf")
            self.event.set()
