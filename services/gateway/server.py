"""The gateway's loop: listeners, connections and the bus in one thread."""

import asyncio
import contextlib
import errno
import ssl
import time
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import structlog

from services.gateway.admission.address_proof import Challenges
from services.gateway.admission.destinations import Admission
from services.gateway.admission.rights import Permissions
from services.gateway.admission.tokens import read_tokens
from services.gateway.bus.announcer import Announcer
from services.gateway.bus.transmissions import Transmissions
from services.gateway.counters import ACCOUNT, BUS_REJECTED, CLIENTS, COLLECTORS, CONNECTIONS, PRESERVING, WATCHERS
from services.gateway.events import Feed
from services.gateway.handler import Desk
from services.gateway.protocol.requests import RequestError
from services.gateway.registry.registry import Registry
from services.gateway.registry.store import Store
from services.gateway.render import event_line, health_line
from services.gateway.transport.connection import AT_ONCE, Connection, Connections
from services.gateway.transport.listeners import BACKLOG, Listener, is_broadcast, is_local, listening, send_datagram
from services.gateway.transport.tls import Handshakes, check_listener, make_context
from shared.bus.endpoint import open_link, queue_limit
from shared.bus.zmq_sockets import Publisher, Requests, Subscriber, new_context, prepare_directory
from shared.ledger import Accounts
from shared.process.lifecycle import (
    BAD_SETTINGS,
    FAILED,
    Lifecycle,
    OperatorError,
    Readiness,
    descriptor_limit,
    next_tick,
    worker_name,
)
from shared.process.memory import Memory
from shared.process.reload import Reload
from shared.settings.model import Settings
from shared.settings.own_listeners import udp_listeners

TICK_SECONDS: Final = 0.25
"""How late a deadline may be noticed."""
LOOPS_SECONDS: Final = 1.0
"""How long copies may come back to us when this host gets an address that they go to."""
DRAIN_SECONDS: Final = 1.5
"""For the answers under way at SIGTERM; the bus lingers for another second."""
SPARE_DESCRIPTORS: Final = 64
"""Kept for listeners, the bus, and connections being refused."""

log = structlog.get_logger()


def serve(settings: Settings, lifecycle: Lifecycle) -> None:
    """Serve until told to drain."""
    print("Starting server...", flush=True)  # as the documented server does
    bus = settings.bus
    tokens = read_tokens(settings)
    secure = any(endpoint.scheme == "tls" for endpoint in settings.gateway.endpoints)
    tls = make_context(settings.gateway, tokens) if secure else None
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
        for listener in listeners:
            check_listener(listener, tokens)
        permissions = Permissions(tokens, names_beyond_loopback=settings.gateway.names_beyond_loopback)
        registry = Registry(
            settings.gateway.max_clients,
            _boot_time,
            max(store.generation + 1, time.time_ns() // 1000),
            store.keep,
            settings.gateway.preserve_seconds,
            settings.gateway.max_clients_per_holder,
        )
        registry.restore(store.entries, store.revision)
        admission = _admission(settings)
        _enter_configured(settings, admission, registry)
        server = _Server(settings, lifecycle, registry, admission, permissions, publisher, subscriber, memory)
        asyncio.run(server.run(listeners, tls))


def _boot_time() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _opened(settings: Settings) -> Store:
    path = settings.database
    if path is not None and path.parent == settings.bus.path:
        prepare_directory(path.parent)  # the broker may not have come yet
    return Store(path, _boot_time)


def _admission(settings: Settings) -> Admission:
    return Admission(
        [stream.name for stream in settings.streams],
        udp_listeners(settings),
        is_local,
        is_broadcast,
        settings.gateway.destinations,
    )


def _enter_configured(settings: Settings, admission: Admission, registry: Registry) -> None:
    """Have the collectors of the settings, and nobody whose copies would come back by a listener of theirs.

    OperatorError, with nothing changed, when one of them can't be admitted.
    """
    clients = []
    for collector in settings.collectors:
        try:
            clients.append(admission.admit_configured(collector))
        except RequestError as refused:
            raise OperatorError(BAD_SETTINGS, f"[[collector]] {collector.name!r}: {refused}") from None
    registry.configure(clients)
    _expel_loops(admission, registry)


def _expel_loops(admission: Admission, registry: Registry) -> None:
    """Take off the list whose copies would come back: listeners and our addresses may be newer than entries."""
    if loops := [entry.client.name for entry in registry.entries() if admission.loops(entry.client)]:
        log.warning(
            "taken off the list: their copies would come back by a listener of ours",
            clients=loops[:10],
            count=len(loops),
        )
        registry.expel(loops)


@dataclass
class _Server:
    settings: Settings
    lifecycle: Lifecycle
    registry: Registry
    admission: Admission
    permissions: Permissions
    publisher: Publisher
    subscriber: Subscriber
    memory: Memory
    _loops_at: float = 0.0

    async def run(self, listeners: list[Listener], tls: ssl.SSLContext | None) -> None:
        """Serve clients on these listeners until told to drain; `tls` is for those that are secure."""
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self._report_trouble)
        settings = self.settings.gateway
        requests = Requests(self.publisher.sender, self.publisher.boot)
        transmissions = Transmissions(self.publisher, requests, allowed=settings.allow_transmit)
        self._feed = feed = Feed(self.registry, partial(event_line, self.registry), partial(health_line, self.registry))
        self._announcer = Announcer(
            self.publisher,
            self.subscriber,
            requests,
            self.registry,
            feed,
            settings.serve_seconds,
            loop.call_later,
            self.memory,
        )
        challenges = Challenges(send_datagram, _boot_time)
        self._desk = Desk(
            self.settings,
            self.registry,
            self.admission,
            challenges,
            self._announcer,
            feed,
            transmissions.begin,
            _boot_time,
            self.permissions,
        )
        limit = min(settings.max_connections, descriptor_limit() - SPARE_DESCRIPTORS)
        self._connections = Connections(self._desk, settings, limit, self.memory)
        self._reload = Reload(self.publisher.sender, self.lifecycle, self.settings, self._follow)
        self._stopped = asyncio.Event()
        for source, act in (
            (self.lifecycle, self._heed),
            (self.publisher, self._announcer.flush),
            (self.subscriber, self._announcer.take_messages),
        ):
            loop.add_reader(source.fileno(), act)
        servers = [  # on duplicates, which the loop closes: ours tell their paths until they are removed
            await loop.create_server(lambda: Connection(self._connections), sock=listener.sock.dup(), backlog=AT_ONCE)
            for listener in listeners
            if not listener.secure
        ]
        for listener in listeners:
            listener.sock.listen(BACKLOG)  # asyncio knows one number for what waits and what it accepts in one go
        handshakes = Handshakes(self._connections, tls) if tls else None
        for listener in listeners:
            if handshakes and listener.secure:
                handshakes.serve(listener)
        await self._tick_until_stopped()
        loop.remove_reader(self.lifecycle.fileno())
        for server in servers:
            server.close()
        if handshakes:
            await handshakes.stop()
        await self._connections.drain(DRAIN_SECONDS)
        self._announcer.flush()

    def _heed(self) -> None:
        """Do what a signal says."""
        self.lifecycle.heed()
        self._reload.check()
        if self.lifecycle.draining:
            self._stopped.set()

    def _follow(self, settings: Settings) -> None:
        """Have the streams and collectors of these settings; OperatorError when that can't be."""
        admission = _admission(settings)
        try:
            _enter_configured(settings, admission, self.registry)
        except RequestError as error:
            raise OperatorError(FAILED, str(error)) from None
        self.admission = admission
        self._desk.follow(settings, admission)
        self._announcer.wake()

    async def _tick_until_stopped(self) -> None:
        readiness = Readiness("gateway", self.settings.bus, lambda: self.publisher.ready)
        while not self._stopped.is_set():
            self.registry.expire()
            self._look_for_loops()
            await self._connections.sweep()
            self._announcer.tick(self._accounts)
            readiness.check(listen=self.settings.gateway.listen)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopped.wait(), next_tick(now := time.monotonic(), TICK_SECONDS) - now)

    def _look_for_loops(self) -> None:
        """Once a second: whoever was signed up elsewhere may be at an address that is ours by now."""
        now = time.monotonic()
        if now >= self._loops_at:
            self._loops_at = now + LOOPS_SECONDS
            with contextlib.suppress(RequestError):  # it can't be told just now
                _expel_loops(self.admission, self.registry)

    def _accounts(self) -> Accounts:
        account = {
            **self._desk.counters,
            CLIENTS: len(self.registry),
            COLLECTORS: self.registry.collectors,
            WATCHERS: len(self._feed),
            PRESERVING: int(self.registry.preserving),
            CONNECTIONS: len(self._connections.open),
            BUS_REJECTED: sum(self.subscriber.rejected.values()),
        }
        return {ACCOUNT: account}

    def _report_trouble(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Say what the loop can't do, such as accept without a descriptor to spare."""
        error = context.get("exception")
        if isinstance(error, OSError) and error.errno == errno.ENOTCONN:
            return  # asyncio half-closes twice at times, and the client may have closed in between
        what, trace = context["message"], None if isinstance(error, OSError) else error
        log.error("trouble in the loop", what=what, reason=repr(error), exc_info=trace)
