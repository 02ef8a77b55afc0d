"""The way of other sites' batches onto this bus: the uplink publishes them as a worker does, under its own numbers."""

import math
import time
from collections import Counter
from collections.abc import Mapping
from typing import Final

import numpy as np

from services.uplink.incoming.doubles import OWN, Doubles, without
from shared.bus.kept_counts import KeptCounts
from shared.bus.messages import Datagrams, datagrams_topic
from shared.bus.publishing.exporter_shares import SharesPublisher
from shared.bus.publishing.held_batches import HeldBatches
from shared.bus.publishing.kept_totals import KeptTotals
from shared.bus.zmq_sockets import Publisher
from shared.datagrams.batch import ROW, DatagramBatch
from shared.ledger.accounts import Accounts
from shared.ledger.counters import BYTES, DOUBLE, NO_SUBSCRIBER, PUBLISHED, RECEIVED

GREET_SECONDS: Final = 0.02
"""Time after publishing until new subscriptions are looked for, whose signal may be gone."""


class Feed:
    """One stream, as other sites send it."""

    def __init__(
        self, stream: str, publisher: Publisher, held: HeldBatches, totals: KeptCounts, doubles: Doubles | None
    ) -> None:
        self.stream = stream
        self._doubles = doubles
        self.topic = datagrams_topic(stream)
        self.account: Counter[str] = Counter()
        self.owes_mark = False
        self._publisher = publisher
        self._held = held
        self._totals = totals
        self.shares = SharesPublisher(stream, publisher)

    @property
    def published(self) -> int:
        """Return our count of what was put on the bus."""
        return self.account[PUBLISHED]

    @property
    def wanted(self) -> bool:
        """Return whether anybody subscribes to it, or will again after a restart."""
        return self._publisher.wanted(self.topic) or self._held.wants(self.stream)

    @property
    def tells_doubles(self) -> bool:
        """Return whether its datagrams have numbers of their exporters."""
        return self._doubles is not None

    def without_doubles(self, site: str, batch: DatagramBatch) -> DatagramBatch:
        """Return a batch of a site without what another one has sent already, which is counted."""
        if self._doubles is None or (found := self._doubles.find(site, batch)) is None:
            return batch
        self.account[DOUBLE] += int(found.sum())
        self.account[RECEIVED] += int(found.sum())
        self.account[BYTES] += int(batch.lengths[found].sum())
        return without(batch, found)

    def note_own(self, batch: DatagramBatch) -> None:
        """Note a batch of this site: what comes of it from elsewhere is a double."""
        if self._doubles:
            self._doubles.find(OWN, batch)

    def publish(self, batch: DatagramBatch) -> bool:
        """Put a batch on the bus; False, with nothing done, while the bus takes no more.

        While nobody wants the stream it is counted and dropped, as ingest does.
        """
        rows, payload = batch.rows, batch.payload
        wanted = self.wanted
        if wanted:
            arrays = (rows.tobytes(), payload)
            body = Datagrams(self.stream, batch.received_ns)
            if not self._publisher.publish(self.topic, body, None, arrays, len(rows)):
                return False
            if self._held.due_at:
                self._held.add(body, len(rows), arrays[0], bytes(payload))
            self.shares.note(rows)
        fate = PUBLISHED if wanted else NO_SUBSCRIBER
        self.account[RECEIVED] += len(rows)
        self.account[BYTES] += len(payload)
        self.account[fate] += len(rows)
        self._totals[fate] = self.account[fate]
        return True

    def mark(self) -> None:
        """Tell a new subscriber the place in the sequence, by a batch without rows; owed while the bus takes none."""
        now = time.time_ns()
        empty = DatagramBatch(self.stream, now, np.empty(0, ROW), b"")
        self.owes_mark = not self._publisher.publish(self.topic, Datagrams(self.stream, now), empty)


class Feeds:
    """The streams that other sites send here, and those who subscribe to them."""

    def __init__(
        self,
        protocols: Mapping[str, str | None],
        publisher: Publisher,
        held: HeldBatches,
        totals: KeptTotals,
        doubles_bytes: int,
    ) -> None:
        self._publisher = publisher
        self._held = held
        self._totals = totals
        self.greet_at = 0.0
        """The time at which new subscriptions are to be looked for."""
        self._by_stream = {
            stream: Feed(
                stream, publisher, held, totals.of(stream), Doubles(protocol, doubles_bytes) if protocol else None
            )
            for stream, protocol in protocols.items()
        }
        totals.keep()

    def __getitem__(self, stream: str) -> Feed:
        return self._by_stream[stream]

    def __contains__(self, stream: str) -> bool:
        return stream in self._by_stream

    def note_own(self, batch: DatagramBatch) -> None:
        """Note a batch of this site, of a stream that comes from other sites too."""
        if feed := self._by_stream.get(batch.stream):
            feed.note_own(batch)

    def note_published(self) -> None:
        """Note that batches were published: the signal of a new subscription may be gone."""
        self.greet_at = min(self.greet_at, time.monotonic() + GREET_SECONDS)

    def greet(self) -> list[str]:
        """Mark the place for new subscribers; return all prefixes newly subscribed to."""
        self.greet_at = math.inf
        told: list[str] = []
        feeds = self._by_stream.values()
        for feed in feeds:
            if feed.owes_mark:
                feed.mark()
        while prefixes := self._publisher.new_subscriptions():
            told += prefixes
            for feed in feeds:
                if any(feed.topic.startswith(prefix) for prefix in prefixes):
                    feed.mark()
            self._held.heed(prefixes, [feed.stream for feed in feeds if feed.wanted])
        return told

    def keep_up(self) -> None:
        """Do what is due each second."""
        self._totals.keep()
        for feed in self._by_stream.values():
            feed.shares.publish()

    def accounts(self) -> Accounts:
        """Return an account a stream."""
        return {f"stream/{name}": dict(feed.account) for name, feed in self._by_stream.items()}
