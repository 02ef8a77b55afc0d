"""One ingest worker: its listeners, its publisher, and the loop that moves datagrams from one to the other."""

import selectors
import socket
import time
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Final, Self

import structlog

from services.ingest.connections import Connections
from services.ingest.feed import StreamFeed
from services.ingest.receiver import DatagramReceiver
from services.ingest.sockets import open_sockets, refuse_left_over, take_inherited, warn_of_small_buffers
from services.ingest.spread import Spreader
from shared.addresses import Endpoint
from shared.batch import MAX_ROWS
from shared.bus import Publisher, new_context
from shared.ledger import CHECKSUM_ERRORS, listener_account, new_accounts
from shared.lifecycle import BAD_SETTINGS, Lifecycle, OperatorError, Readiness
from shared.mmsg import ReceiveArena
from shared.pool import CHUNK, Lender, Pool, pool_path
from shared.settings import Settings, Stream
from shared.sockets import InheritedSocket, bound_endpoint, checksum_errors, enlarge_receive_buffer
from shared.status import Reporter

DRAIN_SECONDS: Final = 2.0
"""How long, after SIGTERM, what the kernel has queued may take."""
RECORD_SIZE: Final = 1024
"""Bytes the kernel charges a datagram beyond its payload, about (struct sk_buff and rounding)."""

log = structlog.get_logger()


def new_pools(streams: list[str], size: int) -> dict[str, Pool]:
    """Memory to lend payloads in; none when it is switched off, or when the kernel gives none."""
    if size < CHUNK:
        return {}
    try:
        return {stream: Pool(stream, size) for stream in streams}
    except OSError as error:
        log.warning("payloads go through the bus: no memory to lend them in", error=str(error), needs="Linux 5.1")
        return {}


class Worker:
    """Receives on every listener of every stream and publishes what comes."""

    def __init__(self, name: str, settings: Settings) -> None:
        self._settings = settings
        self._name = name
        self._accounts = new_accounts()
        self._selector = selectors.DefaultSelector()
        self._arena = ReceiveArena()
        self._receivers: list[DatagramReceiver] = []
        self._connections = Connections(self._selector, settings.ingest)
        self._held_back: list[Callable[[], object]] = []
        """Begins to read an inherited socket each."""
        self._granted: dict[int, int] = {}
        self._bound: set[tuple[int, object]] = set()
        self._spreader = Spreader(settings.ingest.spread)
        self._fill_seconds = settings.ingest.fill_ms / 1000
        self._received_at = 0.0
        self._count = self._size = 0

    def __enter__(self) -> Self:
        self._context = new_context()
        bus = self._settings.bus
        self._publisher = Publisher(self._context, bus.path, self._name, bus.high_water_mark)
        self._reporter = Reporter(self._publisher)
        streams = self._settings.streams
        self._pools = new_pools([stream.name for stream in streams], bus.pool)
        self._feeds = [
            StreamFeed(
                name := stream.name,
                self._publisher,
                self._accounts[f"stream/{name}"],
                self._pools.get(name),
                stream.protocol,
            )
            for stream in streams
        ]
        self._lender = Lender(pool_path(bus.path, self._name), self._pools, self._watch, self._selector.unregister)
        try:
            held = take_inherited()
            for stream, feed in zip(self._settings.streams, self._feeds, strict=True):
                self._listen(stream, feed, held)
            refuse_left_over(held)
        except BaseException:
            self._close()
            raise
        warn_of_small_buffers(self._granted)
        self._spreader.renew()
        self._smallest_buffer = min(self._granted.values(), default=0)
        return self

    def _listen(self, stream: Stream, feed: StreamFeed, held: list[InheritedSocket]) -> None:
        reply = stream.reply.encode() if stream.reply else None
        for endpoint in stream.endpoints:
            if endpoint.path and not self._name.endswith(".1"):
                continue  # a path can't be shared
            for sock in open_sockets(stream, endpoint, held):
                self._refuse_doubles(sock, stream, endpoint)
                account = self._accounts[listener_account(stream.name, str(bound_endpoint(endpoint.scheme, sock)))]
                if endpoint.scheme == "tcp":
                    begin = partial(self._connections.listen, sock, feed, account)
                else:
                    self._granted[stream.receive_buffer] = enlarge_receive_buffer(sock, stream.receive_buffer)
                    receiver = DatagramReceiver(sock, feed, account, self._arena, reply)
                    self._receivers.append(receiver)
                    self._spreader.add(sock)
                    begin = partial(self._read, receiver)
                if isinstance(sock, InheritedSocket):
                    self._held_back.append(begin)
                else:
                    begin()

    def _watch(self, sock: socket.socket, handle: Callable[[], object]) -> None:
        self._selector.register(sock, selectors.EVENT_READ, handle)

    def _read(self, receiver: DatagramReceiver) -> None:
        self._selector.register(receiver, selectors.EVENT_READ, lambda: self._receive(receiver))

    def _refuse_doubles(self, sock: socket.socket, stream: Stream, endpoint: Endpoint) -> None:
        """SO_REUSEPORT would let two streams share an address, and the kernel deal datagrams out between them."""
        bound = sock.type, sock.getsockname()
        if bound in self._bound:
            sock.close()
            raise OperatorError(BAD_SETTINGS, f"stream {stream.name}: {endpoint} is listened on already")
        self._bound.add(bound)

    def _receive(self, receiver: DatagramReceiver) -> None:
        count, size = receiver.receive()
        self._count += count
        self._size += size

    def serve(self, lifecycle: Lifecycle) -> None:
        """Move datagrams until told to drain; ready once bound and once a broker has been seen."""
        listening = [text for stream in self._settings.streams for text in stream.listen]
        readiness = Readiness(self._name, self._settings.bus.path, lambda: self._publisher.ready)
        # Registered to wake the loop; each turn looks at both anyway.
        self._selector.register(lifecycle, selectors.EVENT_READ, lambda: None)
        self._selector.register(self._publisher, selectors.EVENT_READ, lambda: None)
        while not lifecycle.draining:
            self._turn()
            if self._held_back and self._publisher.ready:
                self._begin()
            readiness.check(listen=listening)
        self._drain()

    def _begin(self) -> None:
        """Read inherited sockets from now on: before the broker had said who wants what, it would all be dropped."""
        for begin in self._held_back:
            begin()
        self._held_back = []

    def _turn(self) -> None:
        """Wait for something to do, and do it."""
        ready = self._selector.select(max(0.0, self._reporter.due_at - time.monotonic()))
        self._count = self._size = 0
        self._greet()  # first, so that what comes now goes to who has just subscribed
        for key, _ in ready:
            key.data()
        self._connections.serve()
        now = time.monotonic()
        if now >= self._reporter.due_at:
            self._spreader.renew()
            self._settle()
            self._report()
        self._greet()
        if self._count:
            self._let_fill(now)

    def _let_fill(self, now: float) -> None:
        """Wait a moment when small batches come back to back: waking for each costs more than handling it.

        A lone datagram never waits, nor does anything when what came meanwhile might not fit the receive buffer.
        """
        back_to_back = now - self._received_at < self._fill_seconds
        load = self._size + self._count * RECORD_SIZE
        if back_to_back and self._count < MAX_ROWS // 2 and load < self._smallest_buffer // 8:
            time.sleep(self._fill_seconds)
            now += self._fill_seconds
        self._received_at = now

    def _greet(self) -> None:
        """Tell new subscribers of a stream where it stands, and those of our status what it is.

        Until there are none: what we publish may swallow the edge by which we would hear of the next one.
        """
        while prefixes := self._publisher.new_subscriptions():
            for feed in self._feeds:
                if any(feed.topic.startswith(prefix) for prefix in prefixes):
                    feed.mark(time.time_ns())
            if self._reporter.asked_for(prefixes):
                self._report()

    def _settle(self, *, at_once: bool = False) -> None:
        for feed in self._feeds:
            if feed.exporters:
                feed.exporters.settle(at_once=at_once)

    def _report(self) -> None:
        for receiver in self._receivers:
            receiver.count_kernel_drops()
        self._connections.expire()
        self._accounts["host"][CHECKSUM_ERRORS] = checksum_errors()
        self._reporter.report(lambda: self._accounts)

    def _drain(self) -> None:
        """Take nothing new, but all that the kernel has queued; then say the last word on the accounts.

        An inherited socket is left as it is: it goes on taking, and what it holds is our successor's.
        """
        ours = [receiver for receiver in self._receivers if not receiver.inherited]
        for receiver in ours:
            receiver.refuse_input()
        deadline = time.monotonic() + DRAIN_SECONDS
        for receiver in self._receivers:
            while receiver in ours and receiver.receive()[0] and time.monotonic() < deadline:
                pass
            receiver.count_kernel_drops()
            receiver.close()  # at once: what comes between the count and here is in no account
        self._receivers = []
        self._connections.close(deadline)
        self._settle(at_once=True)
        self._report()
        log.info("drained", service=self._name, **{name: dict(each) for name, each in self._accounts.items()})

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        for receiver in self._receivers:
            receiver.close()
        self._lender.close()
        for pool in self._pools.values():
            pool.close()
        self._selector.close()
        self._publisher.close()
        self._context.term()  # waits for what is queued, at most the linger time
