"""The gateway's loop: listeners, connections and the bus in one thread."""

import asyncio
import contextlib
import errno
import ssl
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from services.gateway.admission.address_proof import AddressProofs
from services.gateway.admission.decision import Admission
from services.gateway.admission.destinations import Destinations
from services.gateway.admission.readmission import find_excess
from services.gateway.admission.tokens import Tokens
from services.gateway.bus.announcer import Announcer
from services.gateway.bus.transmissions import Transmissions
from services.gateway.configured import Configured, check_configured
from services.gateway.counters import (
    ACCOUNT,
    BUS_REJECTED,
    CLIENTS,
    COLLECTORS,
    CONNECTIONS,
    PRESERVING,
    SENDERS_ORIGINAL,
    WATCHERS,
)
from services.gateway.event_feed import EventFeed
from services.gateway.handler import Handler
from services.gateway.registry.pasts import Pasts
from services.gateway.registry.registry import Registry
from services.gateway.registry.store import Store
from services.gateway.render import event_line, health_line
from services.gateway.transport.connection import ClientConnection
from services.gateway.transport.listeners import BACKLOG, Listener, is_broadcast, is_local, listening, send_datagram
from services.gateway.transport.open_connections import AT_ONCE, OpenConnections
from services.gateway.transport.tls import check_listener, make_context
from services.gateway.transport.tls_handshakes import TlsAcceptor
from shared.bus.endpoint import open_link, queue_limit
from shared.bus.zmq_sockets import Publisher, Requests, Subscriber, broker_is_up, new_context, prepare_directory
from shared.ledger.accounts import Accounts
from shared.ledger.counters import FILES_RESTORED
from shared.log import get_logger
from shared.net.sockets import try_endpoint
from shared.process.lifecycle import (
    FAILED,
    Lifecycle,
    OperatorError,
    Readiness,
    descriptor_limit,
    next_tick,
    pause_for,
    worker_name,
)
from shared.process.memory import Memory
from shared.process.reload import Reload
from shared.process.tokens_file import read_tokens
from shared.settings.entries import Token
from shared.settings.model import Settings
from shared.settings.own_listeners import udp_listeners

TICK_SECONDS: Final = 0.25
"""Time by which a deadline may be noticed late."""
IDLE_TICK_SECONDS: Final = 1.0
"""The same, while nobody is connected and no lease runs."""
LOOPS_SECONDS: Final = 1.0
"""Time for which copies may come back when this host gets an address that they go to."""
DRAIN_SECONDS: Final = 1.5
"""Time for the answers under way at SIGTERM; the bus lingers for another second."""
SPARE_DESCRIPTORS: Final = 64
"""Descriptors kept for listeners, the bus, and connections being refused."""

log = get_logger()


def run_gateway(settings: Settings, lifecycle: Lifecycle) -> None:
    """Run the gateway until told to drain."""
    print("Starting server...", flush=True)  # as the documented server does
    bus = settings.bus
    declared = read_tokens(settings)
    tls = _tls_context(settings, declared)
    link, name = open_link(bus, "gateway"), worker_name("gateway")
    memory = Memory(settings.gateway.memory, "[gateway] memory")
    mark = queue_limit(bus.high_water_mark, memory.ceiling)
    with (
        listening(settings.gateway.endpoints) as listeners,
        _opened(settings) as store,
        new_context() as context,
        contextlib.closing(Publisher(context, bus.path, name, mark, link)) as publisher,
        contextlib.closing(Subscriber(context, bus.path, mark, link)) as subscriber,
    ):
        tokens = _tokens(settings, declared, listeners)
        first_generation = max(store.generation + 1, time.time_ns() // 1000)
        preserve_seconds = settings.gateway.preserve_seconds
        pasts = Pasts(time.time, store.keep_pasts, settings.gateway.max_clients)
        pasts.journaled = frozenset(settings.journaled)
        pasts.restore(store.pasts)
        registry = Registry(_boot_time, first_generation, store.keep, preserve_seconds, store.group_secret, pasts)
        registry.restore(store.entries, store.revision, store.withheld)
        destinations = _destinations(settings)
        configured = Configured(settings, destinations, registry)
        _expel_loops(destinations, registry)
        _readmit(registry, tokens, destinations)
        server = _Server(
            settings,
            lifecycle,
            store,
            registry,
            configured,
            destinations,
            tokens,
            store.epoch,
            publisher,
            subscriber,
            memory,
        )
        asyncio.run(server.run(listeners, tls))


def check_gateway(settings: Settings) -> None:
    """Raise what a gateway with these settings would raise here, and bind nothing for long; leave the registry alone.

    Where a broker runs, ports are not tried: its gateway has them.
    """
    declared, link = read_tokens(settings), open_link(settings.bus, "gateway")
    _tls_context(settings, declared)
    bind = partial(try_endpoint, made=settings.bus.path, port_too=not broker_is_up(settings.bus.path, link))
    with listening(settings.gateway.endpoints, bind) as listeners:
        _tokens(settings, declared, listeners)
    check_configured(settings, _destinations(settings))


def _tls_context(settings: Settings, declared: Sequence[Token]) -> ssl.SSLContext | None:
    secure = any(endpoint.scheme == "tls" for endpoint in settings.gateway.endpoints)
    return make_context(settings.gateway, declared) if secure else None


def _tokens(settings: Settings, declared: Sequence[Token], listeners: Iterable[Listener]) -> Tokens:
    for listener in listeners:
        check_listener(listener, declared)
    return Tokens(declared, names_beyond_loopback=settings.gateway.names_beyond_loopback)


def _boot_time() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _opened(settings: Settings) -> Store:
    path = settings.database
    if path is not None and path.parent == settings.bus.path:
        prepare_directory(path.parent)  # the broker may not have come yet
    return Store(path, _boot_time)


def _destinations(settings: Settings) -> Destinations:
    return Destinations(
        [stream.name for stream in settings.streams],
        udp_listeners(settings),
        is_local,
        is_broadcast,
        settings.gateway.destinations,
    )


def _expel_loops(destinations: Destinations, registry: Registry) -> None:
    """Remove collectors whose copies would come back: a listener or an address may be newer than the entry."""
    if loops := [entry for entry in registry.entries() if destinations.find_loop(entry.client)]:
        log.warning(
            "collector removed: its address is one of fanwire's own listeners (loop)",
            clients=[entry.client.name for entry in loops[:10]],
            count=len(loops),
        )
        registry.expel(loops)


def _readmit(registry: Registry, tokens: Tokens, destinations: Destinations) -> None:
    """Take from entries what today's tokens and settings do not allow."""
    excess = find_excess(registry.entries(), tokens, destinations)
    narrowed = [entry for entry, _ in excess.narrowed]
    for event, entries in (
        ("client removed: its token or [gateway] destinations do not allow it any more", excess.removed),
        ("client narrowed to the streams that its token still allows", narrowed),
    ):
        if entries:
            log.warning(event, clients=[entry.client.name for entry in entries[:10]], count=len(entries))
    registry.expel(excess.removed)
    registry.narrow(excess.narrowed)


@dataclass
class _Server:
    settings: Settings
    lifecycle: Lifecycle
    store: Store
    registry: Registry
    configured: Configured
    destinations: Destinations
    tokens: Tokens
    epoch: str
    publisher: Publisher
    subscriber: Subscriber
    memory: Memory
    _loops_at: float = 0.0
    _tick_at: float = 0.0

    async def run(self, listeners: list[Listener], tls: ssl.SSLContext | None) -> None:
        """Accept clients on these listeners until told to drain; `tls` is for the secure ones."""
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self._report_trouble)
        self._listeners = listeners
        self._build(loop)
        self._reload = Reload(self.publisher.sender, self.lifecycle, self.settings, self._apply_settings)
        self._stopped = False
        self._awake = asyncio.Event()
        for source, act in (
            (self.lifecycle, self._heed_signal),
            (self.publisher, self._announcer.flush),
            (self.subscriber, self._receive_messages),
        ):
            loop.add_reader(source.fileno(), act)
        async with self._accepting(loop, listeners, tls):
            await self._tick_until_stopped()
            loop.remove_reader(self.lifecycle.fileno())
        await self._connections.drain(DRAIN_SECONDS)
        self._announcer.flush()

    def _build(self, loop: asyncio.AbstractEventLoop) -> None:
        settings, registry = self.settings.gateway, self.registry
        requests = Requests(self.publisher.sender, self.publisher.boot)
        transmissions = Transmissions(self.publisher, requests)
        self._feed = feed = EventFeed(registry, partial(event_line, registry), partial(health_line, registry))
        self._announcer = announcer = Announcer(
            self.publisher,
            self.subscriber,
            requests,
            registry,
            feed,
            settings.serve_seconds,
            loop.call_later,
            self.memory,
        )
        proofs = AddressProofs(send_datagram, _boot_time)
        self._admission = Admission(
            settings, registry, self.destinations, proofs, announcer.sends_copies, transmissions.sends_frames
        )
        self._handler = Handler(
            self.settings,
            registry,
            self._admission,
            announcer,
            feed,
            transmissions.send_frames,
            _boot_time,
            self.tokens,
            self.epoch,
            time.time,
        )
        limit = min(settings.max_connections, descriptor_limit() - SPARE_DESCRIPTORS)
        self._connections = OpenConnections(self._handler, settings, limit, self.memory)

    @contextlib.asynccontextmanager
    async def _accepting(
        self, loop: asyncio.AbstractEventLoop, listeners: list[Listener], tls: ssl.SSLContext | None
    ) -> AsyncIterator[None]:
        """Accept connections while the context lasts."""
        servers = [  # on duplicates, which the loop closes: the originals know their paths until they are removed
            await loop.create_server(
                lambda: ClientConnection(self._connections), sock=listener.sock.dup(), backlog=AT_ONCE
            )
            for listener in listeners
            if not listener.secure
        ]
        for listener in listeners:
            listener.sock.listen(BACKLOG)  # asyncio has one number for the queue and for accepts at once
        self._acceptor = acceptor = TlsAcceptor(self._connections, tls) if tls else None
        for listener in listeners:
            if acceptor and listener.secure:
                acceptor.accept_on(listener)
        yield
        for server in servers:
            server.close()
        if acceptor:
            await acceptor.stop()

    def _heed_signal(self) -> None:
        """Act on a signal."""
        self.lifecycle.heed()
        self._reload.check()
        if self.lifecycle.draining:
            self._stopped = True
            self._awake.set()

    def _receive_messages(self) -> None:
        """Handle what has come on the bus, and have the tick follow at once if it is due."""
        self._announcer.receive_messages()
        if time.monotonic() >= self._tick_at:
            self._awake.set()

    def _apply_settings(self, settings: Settings) -> None:
        """Use the streams, collectors and tokens of these settings; OperatorError when they can't be used."""
        destinations, declared, before = _destinations(settings), read_tokens(settings), self.tokens
        tls, tokens = _tls_context(settings, declared), _tokens(settings, declared, self._listeners)
        try:
            self.configured.apply(settings, destinations)
            _expel_loops(destinations, self.registry)
            _readmit(self.registry, tokens, destinations)
        except OSError as error:
            raise OperatorError(FAILED, str(error.strerror)) from None
        self.registry.pasts.journaled = frozenset(settings.journaled)
        self.destinations = self._admission.destinations = destinations
        self.tokens = self._handler.tokens = tokens
        self._handler.apply_settings(settings)
        self._connections.cut_changed(before)
        if self._acceptor and tls:
            self._acceptor.context = tls
        self._announcer.announce_soon()

    async def _tick_until_stopped(self) -> None:
        readiness = Readiness("gateway", self.settings.bus, lambda: self.publisher.ready and self.configured.settled)
        while not self._stopped:
            self.registry.expire()
            if self.configured.tick():
                self._announcer.announce_soon()
            self._look_after_registry()
            await self._connections.sweep()
            self._announcer.tick(self._accounts)
            readiness.check(listen=self.settings.gateway.listen)
            awaited = len(self._connections) or self.registry.leases.active or not self.configured.settled
            tick, now = TICK_SECONDS if awaited else IDLE_TICK_SECONDS, time.monotonic()
            self._tick_at = next_tick(now, tick)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_for(self._tick_at - now)):
                    await self._awake.wait()
            self._awake.clear()

    def _look_after_registry(self) -> None:
        """Check once a second: a collector's address may have become one of this host's, or the file may be gone."""
        now = time.monotonic()
        if now >= self._loops_at:
            self._loops_at = now + LOOPS_SECONDS
            self.store.keep_file()
            with contextlib.suppress(OSError):
                self.registry.pasts.prune()
            with contextlib.suppress(OSError):  # the kernel can't tell just now
                _expel_loops(self.destinations, self.registry)

    def _accounts(self) -> Accounts:
        account = {
            **self._handler.counters,
            CLIENTS: len(self.registry),
            COLLECTORS: self.registry.collectors,
            WATCHERS: len(self._feed),
            PRESERVING: int(self.registry.leases.preserving),
            CONNECTIONS: len(self._connections),
            FILES_RESTORED: self.store.restored,
            SENDERS_ORIGINAL: int(self._announcer.sends_copies("original")),
            BUS_REJECTED: sum(self.subscriber.rejected.values()),
        }
        return {ACCOUNT: account}

    def _report_trouble(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Log an error of the loop, such as an accept without a descriptor to spare."""
        error = context.get("exception")
        if isinstance(error, OSError) and error.errno == errno.ENOTCONN:
            return  # asyncio sometimes half-closes twice, and the client may have closed in between
        what, trace = context["message"], None if isinstance(error, OSError) else error
        log.error("error in the gateway's loop", what=what, reason=repr(error), exc_info=trace)
