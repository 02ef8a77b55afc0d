"""A stream's way onto the bus: every datagram received is published, or dropped under a cause."""

import time
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import numpy as np

from services.ingest.flows.exporters import ExporterTracker
from services.ingest.template_feed import TemplateFeed
from shared.bus.kept_counts import KeptCounts, KeptFile
from shared.bus.loans.lender import CHUNK, LENT_SIZE, Loan, Pool, Room
from shared.bus.messages import MAX_MESSAGE, Datagrams, datagrams_topic, inline_topic
from shared.bus.publishing.exporter_shares import SharesPublisher
from shared.bus.publishing.held_batches import HeldBatches
from shared.bus.zmq_sockets import Publisher
from shared.datagrams.batch import ROW, DatagramBatch, Generations, Rows
from shared.datagrams.limits import MAX_PAYLOAD
from shared.ledger.counters import (
    BUS_FULL,
    BYTES,
    EXPORTER_UNREAD,
    NO_MEMORY,
    NO_SUBSCRIBER,
    OVERSIZED,
    PUBLISHED,
    RECEIVED,
)
from shared.log import get_logger
from shared.process.memory import Memory
from shared.settings.entries import Protocol

log = get_logger()


class StreamFeed:
    """Counts and publishes the datagrams of one stream, from all of its listeners.

    Without a pool no payload is lent: all go through the bus.
    """

    def __init__(
        self,
        stream: str,
        publisher: Publisher,
        account: Counter[str],
        pool: Pool | None = None,
        memory: Memory | None = None,
        held: HeldBatches | None = None,
        totals: KeptCounts | None = None,
    ) -> None:
        self.stream = stream
        self.topic = datagrams_topic(stream)
        self.account = account
        self.exporters: ExporterTracker | None = None
        """The exporters, followed by their own numbers; None: the numbers are not read."""
        self._owes_mark = False
        self._protocol: Protocol | None = None
        self._publisher = publisher
        self._pool = pool
        self._memory = memory or Memory()
        self._held = held or HeldBatches(publisher)
        self._totals = KeptFile(None).new_counts() if totals is None else totals
        self._inline = inline_topic(stream)
        self._shares = SharesPublisher(stream, publisher)
        self._templates = TemplateFeed(stream, publisher)

    def look_for(self, protocol: Protocol | None) -> None:
        """Follow exporters' numbers of a protocol from now on; if it has not changed, keep those that are known."""
        if protocol != self._protocol:
            self.settle(at_once=True)
            self._protocol = protocol
            self._follow_anew()

    def _follow_anew(self) -> None:
        self.exporters = ExporterTracker(self._protocol, self.account) if self._protocol else None

    def observe(self, batch: DatagramBatch) -> None:
        """Follow the exporters of datagrams of one receive call, before these are published."""
        if self.exporters:
            with self._contained(len(batch)):
                self.exporters.observe(batch)
                self._templates.observe(self.exporters)

    def settle(self, *, at_once: bool = False) -> None:
        """Count what exporters have sent and has not come. Due every second; at the end `at_once`."""
        if self.exporters:
            with self._contained():
                self.exporters.settle(at_once=at_once)

    @contextmanager
    def _contained(self, count: int = 0) -> Iterator[None]:
        """Follow exporters anew after a fault in what reads their datagrams: copies go on, whatever a stranger sends.

        `count` datagrams are not read because of it.
        """
        try:
            yield
        except Exception as error:
            self.account[EXPORTER_UNREAD] += count
            self._follow_anew()
            log.error(
                "can't follow exporters: they are followed anew; please report this fault",
                stream=self.stream,
                exc_info=error,
            )

    @property
    def wanted(self) -> bool:
        """Return whether anybody subscribes to the stream, or will again after a restart."""
        return self._publisher.wanted(self.topic) or self._held.wants(self.stream)

    def receive(self, count: int, size: int) -> bool:
        """Count datagrams received, `size` bytes together; return whether anybody wants them, else drop them."""
        self.account[RECEIVED] += count
        self.account[BYTES] += size
        wanted = self.wanted
        if wanted and not self._memory.short:
            return True
        self.account[NO_MEMORY if wanted else NO_SUBSCRIBER] += count
        self._totals[NO_SUBSCRIBER] = self.account[NO_SUBSCRIBER]
        return False

    def refuse_oversized(self, count: int) -> None:
        """Count messages that fit no datagram and so were never one of fanwire's."""
        self.account[RECEIVED] += count
        self.account[OVERSIZED] += count

    def lend(self, size: int) -> Loan | None:
        """Return memory for a payload of `size` bytes that is to be lent; None when it is to go through the bus."""
        if self._pool is None or size < LENT_SIZE or self._held.whole or self._publisher.wanted(self._inline):
            return None
        return self._pool.lend()

    def publish(
        self,
        received_ns: int,
        rows: Rows,
        payload: bytes | memoryview,
        loan: Loan | None = None,
        stride: int = 0,
        copied: Generations | None = None,
    ) -> None:
        """Put datagrams that were counted by `receive` on the bus; with a loan `payload` is in its memory.

        `copied` tells the generation by which the kernel has copied each, None: it has copied none.
        """
        batch = DatagramBatch(self.stream, received_ns, rows, payload, stride)
        if loan and len(payload) > MAX_MESSAGE and self._held.wants(self.stream):
            packed = DatagramBatch(self.stream, received_ns, rows, batch.packed(), generations=copied)
            if len(packed.payload) > MAX_MESSAGE:
                self._publish_parts(packed)
                return
        number, chunk = (loan.number, loan.chunk) if loan else (self._lent, None)
        body = self._body(received_ns, number, chunk, stride, copied)
        sent = self._publisher.publish(self.topic, body, batch)
        self.account[PUBLISHED if sent else BUS_FULL] += len(rows)
        self._totals[PUBLISHED] = self.account[PUBLISHED]
        self._shares.note(rows)
        if sent and self._held.due_at and self._held.wants(self.stream):
            self._held.add(body, len(rows), rows.tobytes(), batch.packed())
        if sent and loan and self._pool:
            self._pool.lent(loan)

    def _publish_parts(self, batch: DatagramBatch) -> None:
        """Put datagrams on the bus as several messages, none of them lent: each is held as one that the bus takes."""
        for part in batch.parts(MAX_PAYLOAD):
            self.publish(part.received_ns, part.rows, part.payload, copied=part.generations)

    def publish_few(
        self, received_ns: int, count: int, rows: bytes, payload: bytes, copied: Generations | None = None
    ) -> None:
        """Put a few datagrams that were counted by `receive` on the bus, as the arrays are sent."""
        body = self._body(received_ns, self._lent, None, 0, copied)
        sent = self._publisher.publish(self.topic, body, None, (rows, payload), count)
        self.account[PUBLISHED if sent else BUS_FULL] += count
        self._totals[PUBLISHED] = self.account[PUBLISHED]
        if sent and self._held.due_at and self._held.wants(self.stream):
            self._held.add(body, count, rows, payload)
        self._shares.note(rows)

    def _body(
        self, received_ns: int, loan: int, chunk: int | None, stride: int, copied: Generations | None
    ) -> Datagrams:
        if copied is None:
            return Datagrams(self.stream, received_ns, loan, chunk, stride)
        first = int(copied[0])
        alike = bool((copied == first).all())
        column = b"" if alike else copied.tobytes()
        return Datagrams(self.stream, received_ns, loan, chunk, stride, 0, first if alike else 0, column)

    def tell_exporters(self) -> None:
        """Publish the shares of exporters since the last call. Due every second."""
        self._shares.publish(self.exporters.missed if self.exporters else None)

    def greet(self, prefixes: Collection[str]) -> None:
        """Tell new subscribers the place in the sequence, or the templates, as they ask for; and what is owed."""
        if self._owes_mark or any(self.topic.startswith(prefix) for prefix in prefixes):
            self.mark(time.time_ns())
        with self._contained():
            self._templates.greet(prefixes, self.exporters)

    @property
    def owing(self) -> bool:
        """Return whether the bus did not take what new subscribers are to be told."""
        return self._owes_mark or self._templates.owing

    def mark(self, now_ns: int) -> None:
        """Tell the place in the sequence, by a batch without rows; owed while the bus takes none."""
        if self._pool:
            self._pool.hold_back()
        empty = DatagramBatch(self.stream, now_ns, np.empty(0, ROW), b"")
        self._owes_mark = not self._publisher.publish(self.topic, Datagrams(self.stream, now_ns, self._lent), empty)

    @property
    def _lent(self) -> int:
        """The number of the last loan."""
        return self._pool.number if self._pool else 0


def new_pools(streams: list[str], size: int, room: Room) -> dict[str, Pool]:
    """Return memory to lend payloads in; none when it is switched off, or when the kernel gives none."""
    if size < CHUNK:
        return {}
    try:
        return {stream: Pool(stream, size, room) for stream in streams}
    except OSError as error:
        log.warning(
            "payloads go through the bus, which is slower: no shared memory can be made",
            error=str(error),
            needs="Linux 5.1",
        )
        return {}
