"""The gateway's loop: listeners, connections and the bus in one thread; `start` makes its parts."""

import asyncio
import contextlib
import errno
import ssl
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from services.gateway.admission.address_proof import AddressProofs
from services.gateway.admission.decision import Admission
from services.gateway.admission.destinations import Destinations
from services.gateway.admission.readmission import Readmission, expel_loops
from services.gateway.admission.tokens import Tokens
from services.gateway.bus.announcer import Announcer
from services.gateway.bus.raw_frames import Transmissions
from services.gateway.configured_collectors import Configured
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
from services.gateway.fault_guard import surviving
from services.gateway.from_settings import destinations_of, tls_context, tokens_of
from services.gateway.handler import Handler
from services.gateway.registry.changes import ignore
from services.gateway.registry.registry import Registry
from services.gateway.registry.store import Store
from services.gateway.render import event_line, health_line
from services.gateway.transport.connection import ClientConnection
from services.gateway.transport.listeners import BACKLOG, Listener, send_datagram
from services.gateway.transport.open_connections import AT_ONCE, OpenConnections
from services.gateway.transport.tls_handshakes import TlsAcceptor
from shared.bus.zmq_sockets import Publisher, Requests, Subscriber
from shared.ledger.accounts import Accounts
from shared.ledger.counters import FILES_RESTORED, REVISION
from shared.log import get_logger
from shared.process.lifecycle import (
    FAILED,
    Lifecycle,
    OperatorError,
    Readiness,
    descriptor_limit,
    next_tick,
    pause_for,
)
from shared.process.memory import Memory
from shared.process.reload import Reload
from shared.process.tokens_file import read_tokens
from shared.settings.model import Settings
from shared.settings.own_listeners import FollowedListeners

if TYPE_CHECKING:
    from services.gateway.cluster.member import Member

TICK_SECONDS: Final = 0.25
"""Time by which a deadline may be noticed late."""
IDLE_TICK_SECONDS: Final = 1.0
"""The same, while nobody is connected and no lease runs."""
LOOPS_SECONDS: Final = 1.0
"""Time for which copies may come back when this host gets an address that they go to."""
DRAIN_SECONDS: Final = 1.5
"""Time for the answers under way at SIGTERM; the bus lingers for another second."""
CLUSTER_SECONDS: Final = 2.0
"""Time that a start waits for the registry of a cluster; then it goes on with what it has known last."""
TICK_FAILED: Final = "what is due each second has failed, and is tried again"
SPARE_DESCRIPTORS: Final = 64
"""Descriptors kept for listeners, the bus, and connections being refused."""

log = get_logger()


@dataclass
class Server:
    """The loop; `clock` is that of leases, which counts time asleep too."""

    settings: Settings
    lifecycle: Lifecycle
    store: Store
    registry: Registry
    configured: Configured
    own_listeners: FollowedListeners
    destinations: Destinations
    tokens: Tokens
    readmission: Readmission
    epoch: str
    publisher: Publisher
    subscriber: Subscriber
    memory: Memory
    clock: Callable[[], float]
    member: "Member | None" = None
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
        self._making: set[str] = set()
        self._awake = asyncio.Event()
        self._began = time.monotonic()
        if self.member:
            self.member.changed = self._follow_cluster
            self.member.changes.connected = self._handler.is_connected
            self.member.replica.lost = self._handler.note_lost
            self.member.begin()
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
        if self.member:
            await self.member.end()
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
        proofs = AddressProofs(send_datagram, self.clock)
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
            self.clock,
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

    def _follow_cluster(self) -> None:
        """Announce what other nodes have changed."""
        self._handler.epoch = self.store.epoch
        self._announcer.announce_soon()

    def _is_settled(self) -> bool:
        """Return whether the list is as it is to be, as far as that can be waited for."""
        waits = self.member is not None and not self.member.synced
        return self.configured.settled and (not waits or time.monotonic() > self._began + CLUSTER_SECONDS)

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
        own_listeners = FollowedListeners(settings.streams, self.own_listeners)
        destinations, declared, before = destinations_of(settings, own_listeners), read_tokens(settings), self.tokens
        tls, tokens = tls_context(settings, declared), tokens_of(settings, declared, self._listeners)
        try:
            self.configured.apply(settings, destinations)
        except OSError as error:
            raise OperatorError(FAILED, str(error.strerror)) from None
        # From here on nothing fails: the new settings hold.
        self.registry.changes.make(partial(expel_loops, destinations, self.registry, self.configured.expelled), ignore)
        self.readmission.begin(tokens, destinations)
        self.registry.pasts.journaled = frozenset(settings.journaled)
        self.own_listeners, self.destinations = own_listeners, destinations
        self._admission.destinations = destinations
        self.tokens = self._handler.tokens = tokens
        self._handler.apply_settings(settings)
        self._connections.cut_changed(before)
        if self._acceptor and tls:
            self._acceptor.context = tls
        self._announcer.announce_soon()

    async def _tick_until_stopped(self) -> None:
        readiness = Readiness("gateway", self.settings.bus, lambda: self.publisher.ready and self._is_settled())
        while not self._stopped:
            self._make_once("expire", self.registry.expire)
            if self.member:
                self.member.check()
            with surviving(TICK_FAILED, what="collectors of the settings"):
                if self.configured.tick():
                    self._announcer.announce_soon()
            with surviving(TICK_FAILED, what="registry"):
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
            self.readmission.check()
            self.own_listeners.tick()
            self._make_once("loops", lambda: expel_loops(self.destinations, self.registry, self.configured.expelled))

    def _make_once(self, what: str, act: Callable[[], None]) -> None:
        """Make a change that is due, unless it waits already; after a fault of ours it is tried again."""
        if what not in self._making:
            self._making.add(what)
            with surviving(TICK_FAILED, what=what):
                try:
                    self.registry.changes.make(act, lambda _: self._making.discard(what))
                except Exception:
                    self._making.discard(what)
                    raise

    def _accounts(self) -> Accounts:
        account = {
            **self._handler.counters,
            CLIENTS: len(self.registry),
            REVISION: self.registry.commit(),
            COLLECTORS: self.registry.collectors,
            WATCHERS: len(self._feed),
            PRESERVING: int(self.registry.leases.preserving),
            CONNECTIONS: len(self._connections),
            FILES_RESTORED: self.store.restored,
            SENDERS_ORIGINAL: int(self._announcer.sends_copies("original")),
            BUS_REJECTED: sum(self.subscriber.rejected.values()),
        }
        return {ACCOUNT: account | (self.member.accounts() if self.member else {})}

    def _report_trouble(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Log an error of the loop, such as an accept without a descriptor to spare."""
        error = context.get("exception")
        if isinstance(error, OSError) and error.errno == errno.ENOTCONN:
            return  # asyncio sometimes half-closes twice, and the client may have closed in between
        what, trace = context["message"], None if isinstance(error, OSError) else error
        log.error("error in the gateway's loop", what=what, reason=repr(error), exc_info=trace)
