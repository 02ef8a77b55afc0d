"""One ingest worker: its listeners, its publisher, and the loop that moves datagrams from one to the other."""

import math
import selectors
import socket
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Final, Self

from services.ingest.batch_publisher import StreamFeed, new_pools
from services.ingest.fill_wait import FillWait
from services.ingest.listeners import (
    StreamEndpoint,
    Upkeep,
    listeners_of,
    reopen,
    take_inherited,
    warn_of_small_buffers,
    with_addresses,
)
from services.ingest.packet_marks import MarkReader
from services.ingest.receiver import DatagramReceiver
from services.ingest.reuseport_sharing import Spreader, is_shareable
from services.ingest.tcp_connections import ExporterConnections
from shared.bus.endpoint import open_link, queue_limit
from shared.bus.loans.lender import Lender, Pool, Room, pool_path
from shared.bus.publishing.held_batches import HeldBatches
from shared.bus.publishing.kept_totals import KeptTotals
from shared.bus.status import Reporter
from shared.bus.zmq_sockets import Publisher, new_context
from shared.datagrams.mmsg import ReceiveArena
from shared.ledger.accounts import listener_account, new_accounts
from shared.ledger.counters import CHECKSUM_ERRORS, FILES_RESTORED
from shared.log import get_logger
from shared.net.addresses import Endpoint, is_name
from shared.net.host_lookups import HostLookups
from shared.net.sockets import (
    ChecksumErrors,
    InheritedSocket,
    bound_endpoint,
    enlarge_receive_buffer,
    receive_buffer,
)
from shared.process.lifecycle import Lifecycle, Readiness
from shared.process.memory import Memory
from shared.process.reload import Reload
from shared.settings.entries import Stream
from shared.settings.model import Settings

DRAIN_SECONDS: Final = 2.0
"""Time, after SIGTERM, for the datagrams that the kernel has queued."""
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
        self._arena = ReceiveArena()
        self._receivers: dict[socket.socket, DatagramReceiver] = {}
        self._leaving: list[DatagramReceiver] = []
        """Receivers whose listener is gone, until the datagrams that the kernel has queued are taken."""
        self._listening: dict[StreamEndpoint, list[socket.socket]] = {}
        self._streams: dict[str, Stream] = {}
        self._lookups = HostLookups(math.inf)
        """Of the names of new listeners, while a reload waits for them."""
        self._feeds: dict[str, StreamFeed] = {}
        """By stream. A stream that is gone keeps its feed, account and pool, and uses them again if it comes back."""
        self._pools: dict[str, Pool] = {}
        self._memory = Memory(settings.ingest.memory, "[ingest] memory")
        self._lender: Lender | None = None
        self._totals = KeptTotals()
        self._room = Room((settings.ingest.memory - OWN_MEMORY) // 2)
        self._connections = ExporterConnections(self._selector, settings.ingest)
        self._held_back: dict[socket.socket, Callable[[], object]] = {}
        """The functions that begin to read inherited sockets."""
        self._upkeep = Upkeep()
        self._spreader = Spreader(settings.ingest.spread)
        self._checksum_errors = ChecksumErrors()
        self._marks = MarkReader(settings.offload, self._accounts["ingest"])
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
            self._lookups.follow(())
        self._report()  # at once: services that wait for streams to flow learn from it which there are
        self._upkeep_at = 0.0

    def _names_known(self, settings: Settings) -> bool:
        """Look up the names of new listeners beside the loop; return whether that has ended."""
        new = listeners_of(self._name, settings.streams, self._settings).keys() - self._listening.keys()
        self._lookups.follow({endpoint.host for _, endpoint in new if endpoint.host and is_name(endpoint.host)})
        self._lookups.tick()
        return self._lookups.settled

    def _listen(self, streams: Sequence[Stream], held: Sequence[socket.socket]) -> None:
        """Open exactly the listeners of these streams; leave unchanged ones alone."""
        wanted = with_addresses(listeners_of(self._name, streams, self._settings), self._lookups)
        listening, gone = reopen(wanted, self._listening, held, self._settings)
        for sock in gone:
            self._see_off(sock)
        self._feed(streams)
        changed = {stream.name for stream in streams if self._streams.get(stream.name) != stream}
        granted: dict[int, int] = {}
        for (name, endpoint), sockets in listening.items():
            for sock in sockets if name in changed else ():
                self._start(wanted[name, endpoint], endpoint, sock, granted)
        self._listening, self._streams = listening, {stream.name: stream for stream in streams}
        warn_of_small_buffers(granted)
        every = [(stream.name, endpoint) for stream in streams for endpoint in stream.endpoints]
        if left := [str(listener[1]) for listener in every if listener not in wanted]:
            log.info("listeners that can't be shared are left to the first worker of this host", listen=left)
        self._spreader.renew()
        self._fill.smallest_buffer = min(map(receive_buffer, self._receivers), default=0)

    def _start(self, stream: Stream, endpoint: Endpoint, sock: socket.socket, granted: dict[int, int]) -> None:
        """Make a socket serve a stream's listener; note its receive buffer in `granted`, {asked: granted} in bytes."""
        account = self._accounts[listener_account(stream.name, str(bound_endpoint(endpoint.scheme, sock)))]
        feed = self._feeds[stream.name]
        if endpoint.scheme == "tcp":
            self._accept(sock, feed, account)
        else:
            granted[stream.receive_buffer] = enlarge_receive_buffer(sock, stream.receive_buffer)
            self._receive_from(sock, feed, account, stream)

    def _renew_listeners(self) -> None:
        """Bind paths again that others have removed, and join groups again whose interface is another one."""
        for (name, endpoint), sockets in list(self._listening.items()):
            if is_shareable(endpoint):
                continue
            for sock in list(sockets):
                if fresh := self._upkeep.renew(self._streams[name], endpoint, sock):
                    self._listening[name, endpoint] = [fresh]
                    self._see_off(sock)
                    self._start(self._streams[name], endpoint, fresh, {})

    def _renew_lender(self) -> None:
        """Lend at a new path where others have removed it; subscribers ask there again at a mark."""
        if self._lender is not None and self._lender.renew():
            self._accounts["ingest"][FILES_RESTORED] += 1
            for feed in self._feeds.values():
                feed.mark(time.time_ns())

    def _feed(self, streams: Sequence[Stream]) -> None:
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
        self._held.journaled = frozenset(stream.name for stream in streams if stream.journal)
        for stream in streams:
            self._feeds[stream.name].look_for(stream.protocol)
        self._totals.keep()

    def _accept(self, sock: socket.socket, feed: StreamFeed, account: Counter[str]) -> None:
        if self._connections.feed(sock) is not feed:
            self._connections.leave(sock)
            self._begin_with(sock, partial(self._connections.listen, sock, feed, account))

    def _receive_from(self, sock: socket.socket, feed: StreamFeed, account: Counter[str], stream: Stream) -> None:
        answer = stream.reply.encode() if stream.reply else None
        if receiver := self._receivers.get(sock):
            receiver.assign_stream(feed, account, answer, trains=stream.trains)
            return
        receiver = self._receivers[sock] = DatagramReceiver(
            sock, feed, account, self._arena, answer, trains=stream.trains, marks=self._marks
        )
        self._spreader.add(sock)
        self._begin_with(sock, partial(self._read, receiver))

    def _begin_with(self, sock: socket.socket, begin: Callable[[], object]) -> None:
        """Read a socket from now on; an inherited one once the broker was seen: earlier datagrams would be dropped."""
        if isinstance(sock, InheritedSocket) and not self._publisher.ready:
            self._held_back[sock] = begin
        else:
            begin()

    def _see_off(self, sock: socket.socket) -> None:
        """Take nothing new on a socket, and close it once its queue is read."""
        receiver = self._receivers.pop(sock, None)
        if receiver is None:
            self._connections.leave(sock)
            sock.close()
            return
        self._selector.unregister(receiver)
        self._spreader.remove(sock)
        receiver.refuse_input()
        self._leaving.append(receiver)
        self._upkeep_at = 0.0

    def _take_rest(self) -> None:
        """Read one turn's worth from sockets that are to be closed; close those that have nothing more."""
        for receiver in list(self._leaving):
            if not receiver.receive()[0]:
                receiver.finish()
                self._leaving.remove(receiver)

    def _watch(self, sock: socket.socket, handle: Callable[[], object]) -> None:
        self._selector.register(sock, selectors.EVENT_READ, handle)

    def _read(self, receiver: DatagramReceiver) -> None:
        self._selector.register(receiver, selectors.EVENT_READ)

    def _receive(self, receiver: DatagramReceiver) -> None:
        count, size = receiver.receive()
        self._count += count
        self._size += size

    def run(self, lifecycle: Lifecycle) -> None:
        """Move datagrams until told to drain; ready once bound and once a broker has been seen."""
        readiness = Readiness(self._name, self._settings.bus, lambda: self._publisher.ready)
        reload = Reload(self._name, lifecycle, self._settings, self.apply_settings, self._names_known)
        self._selector.register(lifecycle, selectors.EVENT_READ, lifecycle.heed)
        self._selector.register(self._publisher, selectors.EVENT_READ, self._greet)
        while not lifecycle.draining:
            self._turn()
            if time.monotonic() >= self._upkeep_at:
                self._keep_up()
                reload.check()
                if reload.preparing:
                    self._upkeep_at = min(self._upkeep_at, time.monotonic() + NAMES_SECONDS)
                readiness.check(listen=[str(endpoint) for _, endpoint in self._listening])
        self._drain()

    def _begin(self) -> None:
        """Read inherited sockets from now on."""
        for begin in self._held_back.values():
            begin()
        self._held_back = {}

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
        self._connections.read_due()
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
        if self._held_back and self._publisher.ready:
            self._begin()
        if self._leaving:
            self._take_rest()
        if time.monotonic() >= self._reporter.due_at:
            self._renew_listeners()
            self._renew_lender()
            self._spreader.renew()
            self._connections.expire()
            self._settle()
            for feed in self._feeds.values():
                feed.tell_exporters()
            self._report()
        self._greet()  # what was published may have swallowed the signal by which the next turn would hear of one
        self._upkeep_at = 0.0 if self._leaving else self._reporter.due_at

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
        for receiver in self._receivers.values():
            receiver.count_kernel_drops()
        self._marks.count_sockets(each.reads_marks for each in self._receivers.values())
        self._totals.keep()
        self._accounts["host"][CHECKSUM_ERRORS] = self._checksum_errors.count()
        self._reporter.report(lambda: self._accounts, ended=ended)

    def _drain(self) -> None:
        """Take no new datagrams, but all that the kernel has queued; then send the last report.

        An inherited socket is left as it is: it goes on receiving, and its queue is our successor's.
        """
        everyone = [*self._receivers.values(), *self._leaving]
        ours = [receiver for receiver in everyone if not receiver.inherited]
        for receiver in ours:
            receiver.refuse_input()
        deadline = time.monotonic() + DRAIN_SECONDS
        for receiver in everyone:
            while receiver in ours and receiver.receive()[0] and time.monotonic() < deadline:
                pass
            with suppress(KeyError):  # not read yet, or no more
                self._selector.unregister(receiver)
            receiver.finish()
        self._receivers, self._leaving = {}, []
        self._connections.close(deadline)
        self._settle(at_once=True)
        self._report(ended=True)
        log.info("drained", service=self._name, **{name: dict(each) for name, each in self._accounts.items()})

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        for receiver in (*self._receivers.values(), *self._leaving):
            receiver.close()
        if self._lender is not None:
            self._lender.close()
        self._totals.close()
        for pool in self._pools.values():
            pool.close()
        self._selector.close()
        self._publisher.close()
        self._context.term()  # waits for queued messages, at most the linger time
