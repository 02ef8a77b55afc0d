"""The way of other sites' batches onto this bus: the uplink publishes them as a worker does, under its own numbers."""

import math
import time
from collections import Counter
from collections.abc import Iterable
from typing import Final

import numpy as np

from shared.bus.kept_counts import KeptCounts
from shared.bus.messages import Datagrams, datagrams_topic, exporters_topic
from shared.bus.publishing.exporter_shares import ExporterShares
from shared.bus.publishing.held_batches import HeldBatches
from shared.bus.publishing.kept_totals import KeptTotals
from shared.bus.zmq_sockets import Publisher
from shared.datagrams.batch import ROW, DatagramBatch
from shared.ledger.accounts import Accounts
from shared.ledger.counters import BYTES, NO_SUBSCRIBER, PUBLISHED, RECEIVED

GREET_SECONDS: Final = 0.02
"""Time after publishing until new subscriptions are looked for, whose signal may be gone."""


class Feed:
    """One stream, as other sites send it."""

    def __init__(self, stream: str, publisher: Publisher, held: HeldBatches, totals: KeptCounts) -> None:
        self.stream = stream
        self.topic = datagrams_topic(stream)
        self.account: Counter[str] = Counter()
        self.owes_mark = False
        self._publisher = publisher
        self._held = held
        self._totals = totals
        self._exporters_topic = exporters_topic(publisher.sender)
        self._shares: ExporterShares | None = None

    @property
    def wanted(self) -> bool:
        """Return whether anybody subscribes to it, or will again after a restart."""
        return self._publisher.wanted(self.topic) or self._held.wants(self.stream)

    def publish(self, batch: DatagramBatch, had: int) -> bool:
        """Put a batch on the bus but for its first `had` rows; False, with nothing done, while the bus takes no more.

        While nobody wants the stream it is counted and dropped, as ingest does.
        """
        rows, payload = batch.rows[had:], memoryview(batch.payload)[int(batch.offsets[had]) :]
        wanted = self.wanted
        if wanted:
            arrays = (rows.tobytes(), payload)
            body = Datagrams(self.stream, batch.received_ns)
            if not self._publisher.publish(self.topic, body, None, arrays, len(rows)):
                return False
            if self._held.due_at:
                self._held.add(body, len(rows), arrays[0], bytes(payload))
            if self._shares:
                self._shares.note(rows)
        fate = PUBLISHED if wanted else NO_SUBSCRIBER
        self.account[RECEIVED] += len(rows)
        self.account[BYTES] += len(payload)
        self.account[fate] += len(rows)
        self._totals[fate] = self.account[fate]
        return True

    def tell_exporters(self) -> None:
        """Publish the shares of exporters since the last call; count them only while somebody subscribes."""
        if not self._publisher.wanted(self._exporters_topic):
            self._shares = None
        elif self._shares is None:
            self._shares = ExporterShares(self.stream)
        else:
            self._publisher.publish(self._exporters_topic, self._shares.take())

    def mark(self) -> None:
        """Tell a new subscriber the place in the sequence, by a batch without rows; owed while the bus takes none."""
        now = time.time_ns()
        empty = DatagramBatch(self.stream, now, np.empty(0, ROW), b"")
        self.owes_mark = not self._publisher.publish(self.topic, Datagrams(self.stream, now), empty)


class Feeds:
    """The streams that other sites send here, and those who subscribe to them."""

    def __init__(self, streams: Iterable[str], publisher: Publisher, held: HeldBatches, totals: KeptTotals) -> None:
        self._publisher = publisher
        self._held = held
        self._totals = totals
        self.greet_at = 0.0
        """The time at which new subscriptions are to be looked for."""
        self._by_stream = {stream: Feed(stream, publisher, held, totals.of(stream)) for stream in streams}
        totals.keep()

    def __getitem__(self, stream: str) -> Feed:
        return self._by_stream[stream]

    def __contains__(self, stream: str) -> bool:
        return stream in self._by_stream

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
            feed.tell_exporters()

    def accounts(self) -> Accounts:
        """Return an account a stream."""
        return {f"stream/{name}": dict(feed.account) for name, feed in self._by_stream.items()}
