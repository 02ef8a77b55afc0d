"""The way in: messages of other sites are put in order, and their batches go onto this host's bus."""

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Final

from services.uplink.incoming.arrivals import Arrivals, Key, keys_of
from services.uplink.incoming.feeds import Feeds
from services.uplink.incoming.readers import LATE_NS, PATIENCE_SECONDS, Readers
from services.uplink.packs import Arrived
from services.uplink.session import Session
from shared.bus.kept_counts import KeptCounts, KeptFile
from shared.ledger.accounts import Accounts, unparse_arriving

ASK_SECONDS: Final = 0.02
"""Time for readers of the bus to say how far they are."""
BUSY_SECONDS: Final = 0.005
"""Time until a batch is tried again that the bus did not take."""


class Delivery:
    """Publishes each batch once and in order; acknowledges a message once all of it is on the bus."""

    def __init__(
        self,
        feeds: Feeds,
        kept: KeptFile,
        tables: Mapping[str, Mapping[str, int]],
        readers: Readers,
        ask_readers: Callable[[], None],
        read_own: Callable[[], None],
        crossed: Callable[[Key, range, range], None] | None = None,
    ) -> None:
        self._feeds = feeds
        self._crossed = crossed
        """Is told of each batch: its origin, and its place in the counts of that and of this bus."""
        self._kept = kept
        self._arrivals = Arrivals(time.monotonic)
        self._arrivals.restore(tables)
        self._read_own = read_own
        """Takes what has come by the bus: what this site has is to be known before its doubles come."""
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        """By site: one that is late keeps no other waiting."""
        self._readers = readers
        self._ask_readers = ask_readers
        """Lets them report at once."""
        self._positions: dict[str, KeptCounts] = {}
        for name, counts in self._arrivals.accounts().items():
            self._keep_position(name, counts)
        self._ending = False

    async def deliver(self, session: Session, arrived: Arrived) -> None:
        """Publish what another site has sent, if it is its turn; not any more once this process ends."""
        if self._ending:
            return
        async with self._turns[arrived.origin.site]:
            await self._handle(session, self._arrivals.order(arrived))
        self._feeds.note_published()

    def end(self) -> None:
        """Take no more, so that the senders of copies need not wait for it: JetStream keeps it for the next start."""
        self._ending = True

    async def release_overdue(self, session: Session) -> None:
        """Publish what has waited long enough for an earlier message, until the connection ends."""
        while True:
            await asyncio.sleep(1.0)
            for site, turn in list(self._turns.items()):
                async with turn:
                    await self._handle(session, self._arrivals.overdue(site))

    async def _handle(self, session: Session, ready: list[Arrived]) -> None:
        while ready:
            each = ready.pop(0)
            await self._publish(each)
            await session.acknowledge(each.reply)
            ready[:0] = self._arrivals.follow(each)

    async def _publish(self, arrived: Arrived) -> None:
        feed = self._feeds[arrived.origin.stream]
        for message, (key, total, count) in zip(arrived.batches, keys_of(arrived), strict=True):
            assert message.batch is not None
            had, here = self._arrivals.had(key, total, count), feed.published
            batch = message.batch.part(had, count)
            if had < count and feed.tells_doubles:
                self._read_own()
                batch = feed.without_doubles(key.site, batch)
            if len(batch):
                if time.time_ns() - batch.received_ns > LATE_NS:
                    await self._wait_for_readers(feed.stream)
                while not feed.publish(batch):
                    await asyncio.sleep(BUSY_SECONDS)
                self._readers.note_published(feed.stream, feed.published)
            if self._crossed and had < count:
                self._crossed(key, range(total + had, total + count), range(here, feed.published))
            self._arrivals.note(key, total, count)
            self._keep_position(unparse_arriving(*key), self._arrivals.positions[key].account())

    async def _wait_for_readers(self, stream: str) -> None:
        until = time.monotonic() + PATIENCE_SECONDS
        while not self._readers.follow(stream) and time.monotonic() < until:
            self._ask_readers()
            await asyncio.sleep(ASK_SECONDS)
        if not self._readers.follow(stream):
            self._readers.leave_behind(stream)

    def _keep_position(self, name: str, counts: dict[str, int]) -> None:
        kept = self._positions.get(name)
        if kept is None:
            kept = self._positions[name] = self._kept.new_counts()
        for counter, count in counts.items():
            if kept[counter] != count:
                kept[counter] = count

    def tables(self) -> dict[str, KeptCounts]:
        """Return what is to be kept for the next process."""
        return self._positions

    def report(self) -> Accounts:
        """Return an account of each worker of other sites."""
        found = self._arrivals.accounts()
        self._positions = {name: kept for name, kept in self._positions.items() if name in found}
        return found
