"""The bus, watched: messages into the observer, a picture each second, and whoever waits for it is woken."""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Iterable
from typing import Final

from services.console.history import History
from shared.bus.status import Reporter
from shared.bus.zmq_sockets import Publisher, Subscriber
from shared.fanout.snapshot_request import SnapshotRequest
from shared.ledger.accounts import Accounts
from shared.ledger.counters import CONNECTIONS_EXPIRED, CONNECTIONS_REFUSED
from shared.monitoring.observer import SILENT_SECONDS, TOPICS, Observer
from shared.monitoring.picture import Picture, Verdict
from shared.process.lifecycle import Readiness, next_tick
from shared.process.memory import Memory

PICTURE_SECONDS: Final = 1.0
PICTURE_SHARE: Final = 10
"""Pictures take at most one part in this many of a core: of thousands of collectors there are fewer."""
IDLE_SECONDS: Final = 5.0
"""Between pictures while no page is open: the history takes a step."""
START_SECONDS: Final = 0.05
"""Between looks for the broker, until it is seen."""
AFTER_REPORTS: Final = 0.15
"""Services report at the full second; messages are taken, and a picture is made, this much later."""


def next_look(now: float, seconds: float) -> float:
    """Return when to take messages next: a moment behind the reports of services.

    >>> next_look(12.0, 1.0), next_look(12.25, 5.0)
    (12.15, 15.15)
    """
    return next_tick(now - AFTER_REPORTS, seconds) + AFTER_REPORTS


class Watch:
    """Follows the bus; `picture` is the last one, and `next_picture` waits for another."""

    def __init__(
        self, subscriber: Subscriber, publisher: Publisher, memory: Memory, asked_for: Iterable[str] = ()
    ) -> None:
        self.observer = Observer(asked_for)
        self.history = History()
        self.picture = Picture(time.monotonic(), Verdict("unknown", ("no service has reported yet",)), None, ())
        self.number = 0
        """Grows with each picture."""
        self.pages = 0
        """Pages open now."""
        self.counters = Counter({CONNECTIONS_REFUSED: 0, CONNECTIONS_EXPIRED: 0})
        self.closing = False
        self._subscriber = subscriber
        self._publisher = publisher
        self._memory = memory
        self._reporter = Reporter(publisher, memory)
        self._snapshot = SnapshotRequest(subscriber)
        self._settled_at = time.monotonic() + SILENT_SECONDS
        self._took = 0.0
        self._made = asyncio.Condition()
        for topic in TOPICS:
            subscriber.subscribe(topic)

    @property
    def clock_offset(self) -> float:
        """Seconds from the observer's clock to Unix time."""
        return time.time() - time.monotonic()

    def accounts(self) -> Accounts:
        """Return the console's own account."""
        rejected = sum(self._subscriber.rejected.values())
        return {"console": {"pages": self.pages, "bus_rejected": rejected, **self.counters}}

    def take(self) -> None:
        """Take every message that has come."""
        while message := self._subscriber.receive():
            self.observer.note(message, time.monotonic())
        now = time.monotonic()
        if self.observer.stale:
            self._snapshot.ask()
        if self._reporter.asked_for(self._publisher.new_subscriptions()) or now >= self._reporter.due_at:
            self._reporter.report(self.accounts)

    def fileno(self) -> int:
        """Return the descriptor that wakes `take`: somebody asks for our report. Messages wait for the next look."""
        return self._publisher.fileno()

    def is_ready(self) -> bool:
        """Return whether the broker has been seen."""
        return self._publisher.ready

    async def run(self, readiness: Readiness, stopped: asyncio.Event, **facts: object) -> None:
        """Make pictures until stopped; be ready once the broker was seen, and log these facts."""
        due_at = 0.0
        while not stopped.is_set():
            self.take()
            now = time.monotonic()
            if self.pages:
                due_at = min(due_at, self.picture.at + max(PICTURE_SECONDS, PICTURE_SHARE * self._took))
            if now >= due_at:
                due_at = next_look(now, PICTURE_SECONDS if self.pages else IDLE_SECONDS)
                await self._make(now)
                due_at = max(due_at, now + PICTURE_SHARE * self._took)
            readiness.check(**facts)
            look_at = min(due_at, next_look(now, PICTURE_SECONDS)) if self.is_ready() else now + START_SECONDS
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.01, look_at - time.monotonic())):
                    await stopped.wait()
        self.closing = True
        async with self._made:
            self._made.notify_all()

    async def _make(self, now: float) -> None:
        began = time.thread_time()  # on a busy host the time that passes is mostly that of others
        self.picture = self.observer.picture(now)
        self._took = time.thread_time() - began
        if self._memory.measure():
            self.history.forget_exporters()
        self.history.note(self.picture)
        async with self._made:
            self.number += 1
            self._made.notify_all()

    @property
    def is_new(self) -> bool:
        """Return whether it may not have heard everybody yet, since the console has just been started."""
        return time.monotonic() < self._settled_at

    def current(self, seconds: float = PICTURE_SECONDS) -> Picture:
        """Return a picture that is at most so old."""
        if (now := time.monotonic()) - self.picture.at > seconds:
            self.take()
            self.picture = self.observer.picture(now)
        return self.picture

    async def next_picture(self, seen: int) -> int:
        """Wait for a picture after number `seen`, or the end; return its number."""
        async with self._made:
            await self._made.wait_for(lambda: self.number > seen or self.closing)
        return self.number
