"""The loop of the uplink: the bus on one side, one connection to a NATS server on the other."""

import asyncio
import logging
import math
import time
from collections import Counter
from types import TracebackType
from typing import Final, Self

from services.uplink.incoming.arrivals import POSITION_COUNTERS
from services.uplink.incoming.delivery import Delivery
from services.uplink.incoming.feeds import Feeds
from services.uplink.incoming.opening import Opening
from services.uplink.incoming.readers import Readers
from services.uplink.incoming.receiving import NEXT, Receiver
from services.uplink.nodes.leaders import keep_leaders, return_home
from services.uplink.nodes.node import Node
from services.uplink.outgoing.batches import BusBatches
from services.uplink.outgoing.cursors import CURSOR_COUNTERS
from services.uplink.outgoing.journal_reading import JournalReading
from services.uplink.outgoing.sending import Sending
from services.uplink.session import Session, SessionError
from shared.bus.connection import BusConnection
from shared.bus.kept_counts import KeptFile
from shared.bus.loans.borrower import Borrower
from shared.bus.messages import Message, Status, status_topic
from shared.bus.publishing.held_batches import HeldBatches
from shared.bus.publishing.kept_totals import KeptTotals
from shared.bus.zmq_sockets import check_directory
from shared.ledger.accounts import Accounts
from shared.ledger.counters import (
    ACKNOWLEDGED,
    CONNECTED,
    FILES_RESTORED,
    HELD,
    SERVER_CONNECTIONS,
    TAKEN,
    WAITING_MESSAGES,
)
from shared.log import get_logger
from shared.nats.connection import rotated
from shared.nats.tasks import CLOSING_SECONDS, end_tasks
from shared.nats.troubles import Troubles
from shared.process.event_loop import run_loop
from shared.process.lifecycle import CANT_CREATE, FAILED, Lifecycle, OperatorError, Readiness
from shared.process.memory import Memory
from shared.process.reload import Reload
from shared.settings.model import Settings

READERS: Final = ("forwarder.", "transmitter.", "journal.")
READERS_SECONDS: Final = 5.0
"""Time for which their reports are read after they were asked."""
RESUMED: Final = "resumed/"
RECEIVING: Final = "receiving/"
MISSING: Final = "missing/"
FILL_SECONDS: Final = 0.02
"""Time for which the bus is left alone while a message fills: its queue holds what comes in many times that."""
WINDOW_SHARE: Final = 8
"""One part in this many of the memory ceiling is for live batches of journaled streams whose turn comes later."""
DOUBLES_SHARE: Final = 32
"""Likewise for the numbers of flow exporters' last datagrams."""
RECONNECT_SECONDS: Final = (0.1, 5.0)
"""Time between two attempts to connect, from the first to the longest."""
QUIET_SECONDS: Final = 0.25
INPUT_SECONDS: Final = 1.0
SENDERS_SECONDS: Final = 3.0
"""Time for the senders of copies to end, which then tell the other nodes how far they have got."""
DRAIN_SECONDS: Final = 2.5
"""Time after SIGTERM for all of the drain: ZeroMQ may linger for one more, and honcho kills after five."""

log = get_logger()


class Service:
    """Takes batches from the bus to JetStream, and from there to the bus."""

    def __init__(self, name: str, settings: Settings) -> None:
        self.name = name
        self._settings = settings
        self._uplink = settings.uplink
        self._memory = Memory(self._uplink.memory, "[uplink] memory", borrows=True)
        self._account: Counter[str] = Counter()
        self._troubles = Troubles()
        self._session: Session | None = None
        self._woken: asyncio.Future[None] | None = None
        self._upkeep_at = self._asked_at = 0.0

    def __enter__(self) -> Self:
        bus, streams = self._settings.bus, tuple(stream.name for stream in self._settings.streams)
        check_directory(bus.path)
        self._kept = KeptFile(bus.path / "accounts.uplink")
        try:
            left = self._kept.open()
        except BlockingIOError:
            told = f"another uplink runs on {bus.path}: other sites would get everything twice; stop it first"
            raise OperatorError(CANT_CREATE, told) from None
        self._bus = BusConnection(self.name, bus, self._memory, Borrower)
        self._publisher, self._subscriber = self._bus.publisher, self._bus.subscriber
        self._reporter = self._bus.reporter
        self._totals = KeptTotals()
        self._ended = self._totals.open(bus.path / f"accounts.{self.name}", self._publisher.boot)
        received = self._uplink.received(streams)
        self._held = HeldBatches(self._publisher, self._bus.mark)
        into = {stream for streams in received.values() for stream in streams}
        protocols = {each.name: each.protocol for each in self._settings.streams if each.name in into}
        doubles = self._uplink.memory // DOUBLES_SHARE // max(1, len(into))
        self._feeds = Feeds(protocols, self._publisher, self._held, self._totals, doubles)
        window = self._uplink.memory // WINDOW_SHARE
        self._readers = Readers(self.name, self._publisher.boot)
        self._opening = Opening()
        self._journal = journal = JournalReading(self._publisher, self._subscriber, self._kept.new_counts, window)
        self._batches = BusBatches(self.name, self._subscriber, bus.path, self._kept, self._note_other)
        parts = self._batches, journal, self._kept, self._memory, self._troubles
        self._sending = Sending(self._uplink, *parts, self._offered, self._feeds.note_own)
        self._missing = self._kept.new_counts(left.tables.get(MISSING, {}))
        """By node: the last time, in ns since 1970, at which this one served without it."""
        self._node: Node | None = None
        if self._uplink.nodes:
            own = self._uplink, self._publisher, self._subscriber, self._account, self._pending
            self._node = Node(*own, self._settings.journaled, self._missing)
        readers = self._readers, self._ask_readers
        crossed = self._node.note_crossed if self._node else None
        self._delivery = Delivery(self._feeds, self._kept, left.tables, *readers, self._sending.turn, crossed)
        self._resumed = {f"{RESUMED}{site}": self._kept.new_counts() for site in received}
        for name, counts in self._resumed.items():
            counts.update(left.tables.get(name, {}))
        self._lags: dict[str, Counter[str]] = {f"{RECEIVING}{site}": Counter() for site in received}
        self._receivers = [
            Receiver(site, names, self._account, self._opening.event, self._delivery.deliver, resumed, lag)
            for (site, names), resumed, lag in zip(
                received.items(), self._resumed.values(), self._lags.values(), strict=True
            )
        ]
        self._sending.begin(self._uplink.sent(streams), self._settings.journaled, left.tables)
        return self

    def _note_other(self, message: Message) -> None:
        """Take a message that is none of a worker's: of the journal, or of a reader of the bus."""
        if isinstance(message.body, Status):
            self._readers.note_report(message.envelope.sender, message.body)
            self._opening.note_report(message.envelope.sender, message.body)
            if self._node:
                self._node.note_status(message.envelope, message.body)
        self._journal.handle(message)

    def _pending(self) -> dict[str, int]:
        """Return the messages that are still to come, by site, as far as this connection has told."""
        told = self._lags.items()
        return {name.removeprefix(RECEIVING): lag[WAITING_MESSAGES] for name, lag in told if WAITING_MESSAGES in lag}

    def _ask_readers(self) -> None:
        """Let readers of the bus say how far they are: a new subscription to their status makes them report."""
        self._forget_readers(0.0)
        self._asked_at = time.monotonic()
        for reader in READERS:
            self._subscriber.subscribe(status_topic(reader)[:-1])

    def _forget_readers(self, seconds: float) -> None:
        """Listen to them no more, if they were not asked for so long."""
        if self._asked_at and time.monotonic() >= self._asked_at + seconds:
            self._asked_at = 0.0
            for reader in READERS:
                self._subscriber.unsubscribe(status_topic(reader)[:-1])

    def _offered(self) -> None:
        if self._session is not None:
            self._session.wake.set()

    def run(self, lifecycle: Lifecycle) -> None:
        """Exchange streams until told to drain; ready once a broker has been seen, whether NATS is there or not."""
        run_loop(self._run(lifecycle))

    async def _run(self, lifecycle: Lifecycle) -> None:
        logging.getLogger("asyncio").setLevel(logging.ERROR)  # it warns at the end of each connection by TLS
        loop = asyncio.get_running_loop()
        readiness = Readiness(self.name, self._settings.bus, lambda: self._publisher.ready)
        reload = Reload(self.name, lifecycle, self._settings, self._check_streams)
        for descriptor in (self._batches.fileno(), self._publisher.fileno(), lifecycle.fileno()):
            loop.add_reader(descriptor, self._wake)
        exchange = asyncio.create_task(self._stay_connected())
        self._ask_readers()
        try:
            while not lifecycle.draining:
                self._sending.turn()
                self._keep_up()
                lifecycle.heed()
                reload.check()
                readiness.check(site=self._uplink.site)
                await self._wait(self._due_in())
                if exchange.done():
                    exchange.result()
            loop.remove_reader(lifecycle.fileno())  # readable from now on
            await self._drain()
        finally:
            for descriptor in (self._batches.fileno(), self._publisher.fileno(), lifecycle.fileno()):
                loop.remove_reader(descriptor)
            await end_tasks([exchange], CLOSING_SECONDS)
            if not exchange.cancelled():
                exchange.result()
        self._finish()

    def _check_streams(self, settings: Settings) -> None:
        """Raise OperatorError where other streams go to other sites, or come from there, than since the start."""
        if self._exchanged(settings) != self._exchanged(self._settings):
            raise OperatorError(
                FAILED, "what goes to other sites, or comes from there, has changed; restart the uplink"
            )

    def _exchanged(self, settings: Settings) -> object:
        """Return all of the streams that has to do with other sites."""
        names = tuple(stream.name for stream in settings.streams)
        sent, received = self._uplink.sent(names), self._uplink.received(names)
        into = {stream for streams in received.values() for stream in streams}
        protocols = {each.name: each.protocol for each in settings.streams if each.name in into}
        return (
            {*sent},
            {site: {*streams} for site, streams in received.items()},
            {*sent} & {*settings.journaled},
            protocols,
        )

    def _wake(self) -> None:
        if self._woken is not None and not self._woken.done():
            self._woken.set_result(None)

    async def _wait(self, seconds: float) -> None:
        """Wait for what comes; while a message fills, look at the bus now and then: to wake costs more than to read."""
        if seconds <= 0 or not self._sending.filling:
            await self._pause(seconds)
            return
        loop, descriptor = asyncio.get_running_loop(), self._batches.fileno()
        loop.remove_reader(descriptor)
        try:
            await self._pause(min(seconds, FILL_SECONDS))
        finally:
            loop.add_reader(descriptor, self._wake)

    async def _pause(self, seconds: float) -> None:
        """Let others run, and wait until there is something to do."""
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        loop = asyncio.get_running_loop()
        self._woken = loop.create_future()
        timer = loop.call_later(seconds, self._wake)
        try:
            await self._woken
        finally:
            timer.cancel()
            self._woken = None

    def _due_in(self) -> float:
        """Return the seconds until there is something to do, if nothing comes."""
        if self._batches.more:
            return 0.0
        if self._publisher.readable():
            return 0.0
        due = min(self._upkeep_at, self._feeds.greet_at, self._held.due_at or math.inf, self._sending.due_at)
        due = min(due, self._opening.due_at, self._node.due_at if self._node else math.inf)
        return max(0.0, due - time.monotonic())

    def _keep_up(self) -> None:
        """Do what is due beside batches."""
        now, prefixes = time.monotonic(), []
        if not self._opening.event.is_set():
            self._opening.check(ready=self._publisher.ready)
        if now >= self._feeds.greet_at or self._publisher.readable():
            prefixes = self._feeds.greet()
            if prefixes and self._reporter.asked_for(prefixes):
                self._report()
        if self._node and (prefixes or now >= self._node.due_at):
            self._node.keep_up(prefixes)
        if self._held.due_at and now >= self._held.due_at:
            self._held.hand_on(short=self._memory.short)
        if self._kept.stale or self._kept.suspended:
            self._keep()
        if now >= self._upkeep_at:
            self._memory.measure()
            self._feeds.keep_up()
            if self._opening.event.is_set():
                self._forget_readers(READERS_SECONDS)
            self._sending.keep_up()
            self._account[FILES_RESTORED] += self._kept.renew()
            self._report()
            self._upkeep_at = self._reporter.due_at

    def _keep(self) -> None:
        """Keep the counters that there are now; their values are stored as they change."""
        tables = {**self._sending.tables(), **self._delivery.tables(), **self._resumed, MISSING: self._missing}
        self._kept.keep([], tables, {**self._batches.room(), **_ROOM, MISSING[:-1]: self._uplink.nodes})

    async def _stay_connected(self) -> None:
        """Connect to one server after the other; use each as long as it lasts."""
        shortest, longest = RECONNECT_SECONDS
        pause = shortest
        for endpoint in rotated(self._uplink):
            began = time.monotonic()
            session = Session(self._uplink, self._sending.outbox, self._account, self._troubles)
            try:
                await session.open(endpoint)
                self._account[SERVER_CONNECTIONS] += 1
                self._account[CONNECTED] = 1
                self._session = session
                self._troubles.end("connection", "connected to a NATS server again")
                log.info("connected to a NATS server", server=str(endpoint), site=self._uplink.site)
                own = endpoint == self._uplink.endpoints[0]
                beats = [self._node.run, keep_leaders if own else return_home] if self._node else []
                receiving = [receiver.run for receiver in self._receivers]
                await session.run(self._delivery.release_overdue, *receiving, *beats)
                self._troubles.say(f"connection {endpoint}", f"the connection to {endpoint} has ended; trying again")
            except (SessionError, OperatorError) as error:
                self._troubles.say(f"connection {endpoint}", f"{error}; trying again")
            finally:
                self._account[CONNECTED] = 0
                self._session = None
            pause = shortest if time.monotonic() - began > longest else min(longest, 2 * pause)
            await asyncio.sleep(pause)

    def _report(self, *, ended: bool = False) -> None:
        self._reporter.report(self._accounts, ended=ended)

    def _accounts(self) -> Accounts:
        rejected = sum(self._subscriber.rejected.values())
        own = {**self._account, "bus_rejected": rejected, **self._batches.counters}
        return {
            "uplink": own,
            **self._ended,
            **self._feeds.accounts(),
            **self._sending.report(),
            **self._delivery.report(),
            **{name: dict(lag) for name, lag in self._lags.items()},
        }

    async def _drain(self) -> None:
        """Take what still comes by the bus, and give JetStream time to acknowledge what waits."""
        self._batches.hand_over()
        self._delivery.end()
        began = time.monotonic()
        quiet_at = began + QUIET_SECONDS
        while (now := time.monotonic()) < began + INPUT_SECONDS and (now < quiet_at or not self._batches.handed_over):
            before = self._sending.taken()
            self._sending.turn()
            self._keep_up()
            if self._sending.taken() > before:
                quiet_at = now + QUIET_SECONDS
            await self._pause(0.01)
        self._sending.close_all()
        while self._awaits_acknowledgements(began) or self._awaits_senders(began):
            self._batches.read_others()
            self._keep_up()
            await asyncio.sleep(0.01)
        if self._node and self._node.senders_ended and self._session:
            await self._node.beat(self._session, "left")

    def _awaits_acknowledgements(self, began: float) -> bool:
        """Return whether JetStream may still acknowledge some of what was sent."""
        outbox = self._sending.outbox
        return not outbox.empty and outbox.connected and time.monotonic() < began + DRAIN_SECONDS

    def _awaits_senders(self, began: float) -> bool:
        """Return whether the senders of copies here are still to tell how far they have got."""
        return bool(self._node and not self._node.senders_ended and time.monotonic() < began + SENDERS_SECONDS)

    def _finish(self) -> None:
        self._sending.finish()
        self._report(ended=True)
        told = {name: dict(each) for name, each in self._sending.accounts.items()}
        log.info("drained", service=self.name, **told)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._batches.close()
        self._totals.close()
        self._kept.close()
        self._bus.close()


_ROOM: Final = {
    "sending": (TAKEN, ACKNOWLEDGED, HELD),
    "arriving": POSITION_COUNTERS,
    "resumed": (NEXT,),
    "cursor": CURSOR_COUNTERS,
}
