"""One ingest worker: its feeds, its publisher, and the loop in which `open_listeners` brings datagrams to them."""

import math
import selectors
import socket
import time
from collections import Counter
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Final, Self

from services.ingest.batch_publisher import StreamFeed, new_pools
from services.ingest.fill_wait import FillWait
from services.ingest.listeners import take_inherited
from services.ingest.open_listeners import OpenListeners
from services.ingest.receiver import DatagramReceiver
from shared.bus.endpoint import open_link, queue_limit
from shared.bus.loans.lender import Lender, Pool, Room, pool_path
from shared.bus.publishing.held_batches import HeldBatches
from shared.bus.publishing.kept_totals import KeptTotals
from shared.bus.status import Reporter
from shared.bus.zmq_sockets import Publisher, new_context
from shared.ledger.accounts import new_accounts
from shared.ledger.counters import CHECKSUM_ERRORS, FILES_RESTORED
from shared.log import get_logger
from shared.net.sockets import ChecksumErrors
from shared.process.lifecycle import Lifecycle, Readiness
from shared.process.memory import Memory
from shared.process.reload import Reload
from shared.settings.entries import Stream
from shared.settings.model import Settings

GREET_SECONDS: Final = 0.02
"""Time after publishing until new subscriptions are looked for: their signal may be gone, and a look costs as much as
a datagram."""
NAMES_SECONDS: Final = 0.05
"""Time by which the last answer that a reload waits for is noticed late."""
UNMEASURED: Final = 1 << 20
"""Bytes that may be received before the process's memory is measured again."""
OWN_MEMORY: Final = 128 << 20
"""Bytes that a worker takes for itself: its code, and room for the largest datagrams."""

log = get_logger()


class Worker:
    """Receives on every listener of every stream and publishes what comes."""

    def __init__(self, name: str, settings: Settings) -> None:
        self._settings = settings
        self._name = name
        self._accounts = new_accounts()
        self._selector = selectors.DefaultSelector()
        self._feeds: dict[str, StreamFeed] = {}
        """By stream. A stream that is gone keeps its feed, account and pool, and uses them again if it comes back."""
        self._pools: dict[str, Pool] = {}
        self._memory = Memory(settings.ingest.memory, "[ingest] memory")
        self._lender: Lender | None = None
        self._totals = KeptTotals()
        self._room = Room((settings.ingest.memory - OWN_MEMORY) // 2)
        self._checksum_errors = ChecksumErrors()
        self._fill = FillWait(settings.ingest.fill_ms / 1000)
        self._count = self._size = self._unmeasured = 0
        self._upkeep_at, self._greet_at = 0.0, math.inf

    def __enter__(self) -> Self:
        bus = self._settings.bus
        link = open_link(bus, "ingest")
        self._context = new_context()
        limit = queue_limit(bus.high_water_mark, self._memory.ceiling)
        self._publisher = Publisher(self._context, bus.path, self._name, limit, link)
        self._held = HeldBatches(self._publisher, limit)
        self._reporter = Reporter(self._publisher, self._memory)
        self._listeners = OpenListeners(
            self._name, self._settings, self._selector, self._feeds, self._accounts, lambda: self._publisher.ready
        )
        try:
            path, boot = pool_path(bus.path, self._name), self._publisher.boot
            self._lender = Lender(path, boot, self._pools, self._watch, self._selector.unregister)
            ended = self._totals.open(bus.path / f"accounts.{self._name}", boot)
            self._accounts.update({name: Counter(counts) for name, counts in ended.items()})
            self._listen(self._settings.streams, take_inherited())
        except BaseException:
            self._close()
            raise
        return self

    def apply_settings(self, settings: Settings) -> None:
        """Listen as these settings say. OperatorError, with nothing changed, when a listener can't be had."""
        try:
            self._listen(settings.streams, [])
        finally:
            self._listeners.forget_names()
        self._report()  # at once: services that wait for streams to flow learn from it which there are
        self._upkeep_at = 0.0

    def _listen(self, streams: Sequence[Stream], held: Sequence[socket.socket]) -> None:
        """Open exactly the listeners of these streams."""
        self._listeners.open(streams, held, self._make_feeds)
        self._fill.smallest_buffer = self._listeners.smallest_buffer

    def _renew_lender(self) -> None:
        """Lend at a new path where others have removed it; subscribers ask there again at a mark."""
        if self._lender is not None and self._lender.renew():
            self._accounts["ingest"][FILES_RESTORED] += 1
            for feed in self._feeds.values():
                feed.mark(time.time_ns())

    def _make_feeds(self, streams: Sequence[Stream]) -> None:
        """Make feeds for new streams; tell those that already subscribe to one that it flows."""
        fresh = [stream.name for stream in streams if stream.name not in self._feeds]
        self._pools.update(new_pools(fresh, self._settings.bus.lent, self._room))
        for name in fresh:
            account = self._accounts[f"stream/{name}"]
            feed = StreamFeed(
                name, self._publisher, account, self._pools.get(name), self._memory, self._held, self._totals.of(name)
            )
            self._feeds[name] = feed
            if self._publisher.wanted(feed.topic):
                feed.mark(time.time_ns())
        self._held.note_journaled(stream.name for stream in streams if stream.journal)
        for stream in streams:
            self._feeds[stream.name].look_for(stream.protocol)
        self._totals.keep()

    def _watch(self, sock: socket.socket, handle: Callable[[], object]) -> None:
        self._selector.register(sock, selectors.EVENT_READ, handle)

    def _receive(self, receiver: DatagramReceiver) -> None:
        count, size = receiver.receive()
        self._count += count
        self._size += size

    def run(self, lifecycle: Lifecycle) -> None:
        """Move datagrams until told to drain; ready once bound and once a broker has been seen."""
        readiness = Readiness(self._name, self._settings.bus, lambda: self._publisher.ready)
        reload = Reload(self._name, lifecycle, self._settings, self.apply_settings, self._listeners.are_names_known)
        self._selector.register(lifecycle, selectors.EVENT_READ, lifecycle.heed)
        self._selector.register(self._publisher, selectors.EVENT_READ, self._greet)
        while not lifecycle.draining:
            self._turn()
            if time.monotonic() >= self._upkeep_at:
                self._keep_up()
                reload.check()
                if reload.preparing:
                    self._upkeep_at = min(self._upkeep_at, time.monotonic() + NAMES_SECONDS)
                readiness.check(listen=self._listeners.endpoints)
        self._drain()

    def _turn(self) -> None:
        """Wait for datagrams, or until something else is to be done; receive and publish them."""
        due_at = min(self._upkeep_at, self._greet_at, self._held.due_at or math.inf)
        ready = self._selector.select(max(0.0, due_at - time.monotonic()))
        self._count = self._size = 0
        for key, _ in ready:
            if not isinstance(key.fileobj, DatagramReceiver):  # new subscribers before datagrams that come now
                key.data()
                self._upkeep_at = 0.0
        for key, _ in ready:
            if isinstance(key.fileobj, DatagramReceiver):
                self._receive(key.fileobj)
        self._listeners.connections.read_due()
        now = time.monotonic()
        if self._count:
            self._greet_at = min(self._greet_at, now + GREET_SECONDS)
            self._unmeasured += self._size
            if self._unmeasured >= UNMEASURED or self._memory.short:
                self._measure()
        if now >= self._greet_at:
            self._greet()
        if self._held.due_at and now >= self._held.due_at:
            self._held.hand_on(short=self._memory.short)
        if self._count:
            self._fill.wait(now, self._count, self._size)

    def _measure(self) -> None:
        self._unmeasured = 0
        self._memory.measure()

    def _keep_up(self) -> None:
        """Do what is due beside receiving."""
        self._measure()
        self._listeners.begin_held_back()
        self._listeners.take_rest()
        if time.monotonic() >= self._reporter.due_at:
            self._listeners.keep_up()
            self._renew_lender()
            self._settle()
            for feed in self._feeds.values():
                feed.tell_exporters()
            self._report()
        self._greet()  # what was published may have swallowed the signal by which the next turn would hear of one
        self._upkeep_at = 0.0 if self._listeners.leaving else self._reporter.due_at

    def _greet(self) -> None:
        """Answer new subscribers of a stream or of its templates, and send new subscribers of our status a report.

        Repeat this until there are none: publishing may swallow the edge that signals the next one.
        """
        self._greet_at = math.inf
        for feed in self._feeds.values():
            feed.greet(())
        while prefixes := self._publisher.new_subscriptions():
            for feed in self._feeds.values():
                feed.greet(prefixes)
            self._held.heed(prefixes, [name for name, feed in self._feeds.items() if feed.wanted])
            if self._reporter.asked_for(prefixes):
                self._report()
        if any(feed.owing for feed in self._feeds.values()):
            self._greet_at = time.monotonic() + GREET_SECONDS

    def _settle(self, *, at_once: bool = False) -> None:
        for feed in self._feeds.values():
            feed.settle(at_once=at_once)

    def _report(self, *, ended: bool = False) -> None:
        self._listeners.count()
        self._totals.keep()
        self._accounts["host"][CHECKSUM_ERRORS] = self._checksum_errors.count()
        self._reporter.report(lambda: self._accounts, ended=ended)

    def _drain(self) -> None:
        """Publish what the kernel has queued, then send the last report."""
        self._listeners.drain()
        self._settle(at_once=True)
        self._report(ended=True)
        log.info("drained", service=self._name, **{name: dict(each) for name, each in self._accounts.items()})

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        self._listeners.close()
        if self._lender is not None:
            self._lender.close()
        self._totals.close()
        for pool in self._pools.values():
            pool.close()
        self._selector.close()
        self._publisher.close()
        self._context.term()  # waits for queued messages, at most the linger time
