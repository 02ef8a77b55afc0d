"""A stream's way onto the bus: every datagram that was received is published, or dropped under a cause."""

from collections import Counter

import numpy as np

from shared.batch import ROW, DatagramBatch, Rows
from shared.bus import Publisher
from shared.ledger import BUS_FULL, BYTES, NO_SUBSCRIBER, OVERSIZED, PUBLISHED, RECEIVED
from shared.wire import Datagrams, datagrams_topic


class StreamFeed:
    """Counts and publishes the datagrams of one stream, whichever listener they came by."""

    def __init__(self, stream: str, publisher: Publisher, account: Counter[str]) -> None:
        self.stream = stream
        self.topic = datagrams_topic(stream)
        self.account = account
        self._publisher = publisher

    def receive(self, count: int, size: int) -> bool:
        """Count datagrams received, `size` bytes together; return whether anybody wants them, else they are dropped."""
        self.account[RECEIVED] += count
        self.account[BYTES] += size
        if self._publisher.wanted(self.topic):
            return True
        self.account[NO_SUBSCRIBER] += count
        return False

    def refuse_oversized(self, count: int) -> None:
        """Count messages that fit no datagram and so were never one of ours."""
        self.account[RECEIVED] += count
        self.account[OVERSIZED] += count

    def publish(self, received_ns: int, rows: Rows, payload: bytes) -> None:
        """Put datagrams that were counted by `receive` on the bus."""
        batch = DatagramBatch(self.stream, received_ns, rows, payload)
        sent = self._publisher.publish(self.topic, Datagrams(self.stream, received_ns), batch)
        self.account[PUBLISHED if sent else BUS_FULL] += len(rows)

    def mark(self, now_ns: int) -> None:
        """Tell a new subscriber where the sequence stands, by a batch without rows."""
        empty = DatagramBatch(self.stream, now_ns, np.empty(0, ROW), b"")
        self._publisher.publish(self.topic, Datagrams(self.stream, now_ns), empty)
