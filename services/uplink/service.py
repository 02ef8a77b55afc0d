"""The loop of the uplink: the bus on one side, one connection to a NATS server on the other."""

import asyncio
import logging
import math
import time
from collections import Counter, defaultdict
from contextlib import suppress
from types import TracebackType
from typing import Final, Self

from services.uplink.arrivals import POSITION_COUNTERS, Arrivals, keys_of
from services.uplink.batches import BusBatches, Taken
from services.uplink.feeds import GREET_SECONDS, Feeds
from services.uplink.outbox import Outbox
from services.uplink.packs import Arrived, Packer
from services.uplink.receiving import NEXT, Receiver
from services.uplink.session import Session, SessionError, rotated
from services.uplink.subjects import Origin
from services.uplink.troubles import Troubles
from shared.bus.endpoint import open_link, queue_limit
from shared.bus.kept_counts import KeptCounts, KeptFile, Sheet
from shared.bus.loans.borrower import Borrower
from shared.bus.publishing.held_batches import HeldBatches
from shared.bus.publishing.kept_totals import KeptTotals
from shared.bus.status import Reporter
from shared.bus.zmq_sockets import Publisher, Subscriber, check_directory, new_context
from shared.ledger.accounts import Accounts, unparse_arriving
from shared.ledger.counters import (
    ACKNOWLEDGED,
    CONNECTED,
    FILES_RESTORED,
    HELD,
    NO_MEMORY,
    SERVER_CONNECTIONS,
    STOPPED,
    TAKEN,
    UNSERVED,
    UNSURE,
)
from shared.log import get_logger
from shared.process.lifecycle import CANT_CREATE, Lifecycle, OperatorError, Readiness
from shared.process.memory import Memory
from shared.process.reload import Reload
from shared.settings.model import Settings

TURN_MESSAGES: Final = 256
SENDING: Final = "sending/"
RESUMED: Final = "resumed/"
WAITING_SHARE: Final = 3
"""One part in this many of the memory ceiling may wait for JetStream."""
FILL_SECONDS: Final = 0.02
"""Time for which the bus is left alone while a message fills: its queue holds what comes in many times that."""
BUSY_SECONDS: Final = 0.005
"""Time until a batch is tried again that the bus did not take."""
RECONNECT_SECONDS: Final = (0.1, 5.0)
"""Time between two attempts to connect, from the first to the longest."""
QUIET_SECONDS: Final = 0.25
INPUT_SECONDS: Final = 1.0
DRAIN_SECONDS: Final = 2.5
"""Time after SIGTERM for all of the drain: ZeroMQ may linger for one more, and honcho kills after five."""
FORGET_SECONDS: Final = 60.0
"""Time after which a worker that sends nothing is no longer known to the sending side."""

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
        self._upkeep_at = self._greet_at = 0.0
        self._packers: dict[tuple[str, int, str], Packer] = {}
        self._packed_at: defaultdict[tuple[str, int, str], float] = defaultdict(lambda: -math.inf)
        self._arriving: dict[str, KeptCounts] = {}
        self._sending: dict[str, KeptCounts] = {}

    def __enter__(self) -> Self:
        bus, streams = self._settings.bus, tuple(stream.name for stream in self._settings.streams)
        check_directory(bus.path)
        self._kept = KeptFile(bus.path / "accounts.uplink")
        try:
            left = self._kept.open()
        except BlockingIOError:
            told = f"another uplink runs on {bus.path}: other sites would get everything twice; stop it first"
            raise OperatorError(CANT_CREATE, told) from None
        link = open_link(bus, "uplink")
        self._context = new_context()
        mark = queue_limit(bus.high_water_mark, self._uplink.memory)
        self._publisher = Publisher(self._context, bus.path, self.name, mark, link)
        self._subscriber = Subscriber(self._context, bus.path, mark, link, Borrower)
        self._reporter = Reporter(self._publisher, self._memory)
        self._totals = KeptTotals()
        self._ended = self._totals.open(bus.path / f"accounts.{self.name}", self._publisher.boot)
        received = self._uplink.received(streams)
        self._held = HeldBatches(self._publisher, mark)
        into = dict.fromkeys(stream for streams in received.values() for stream in streams)
        self._feeds = Feeds(into, self._publisher, self._held, self._totals)
        self._outbox = Outbox(
            self._uplink.memory // WAITING_SHARE, self._uplink.in_flight, self._new_account, time.monotonic
        )
        self._batches = BusBatches(self.name, self._subscriber, bus.path, self._kept)
        self._arrivals = Arrivals(time.monotonic)
        self._turns = asyncio.Lock()
        self._resumed = {f"{RESUMED}{site}": self._kept.new_counts() for site in received}
        self._receivers = [
            Receiver(site, names, self._account, self._deliver, self._resumed[f"{RESUMED}{site}"])
            for site, names in received.items()
        ]
        self._begin(left, self._uplink.sent(streams))
        return self

    def _begin(self, left: Sheet, sent: tuple[str, ...]) -> None:
        """Go on with the accounts and positions of the last process."""
        for name, counts in left.tables.items():
            if name.startswith(SENDING):
                account = self._outbox.accounts[name.removeprefix(SENDING)]
                account.update(counts)
                account[UNSURE] += account[HELD]  # it was in the hands of the last process when that was killed
                account[HELD] = 0
            elif name in self._resumed:
                self._resumed[name].update(counts)
        for stream in sent:
            self._outbox.accounts[stream].update()  # there from the start
        self._arrivals.restore(left.tables)
        self._batches.begin(sent, left.tables)

    def _new_account(self, stream: str) -> Counter[str]:
        self._sending[f"{SENDING}{stream}"] = account = self._kept.new_counts()
        return account

    def run(self, lifecycle: Lifecycle) -> None:
        """Exchange streams until told to drain; ready once a broker has been seen, whether NATS is there or not."""
        asyncio.run(self._run(lifecycle))

    async def _run(self, lifecycle: Lifecycle) -> None:
        logging.getLogger("asyncio").setLevel(logging.ERROR)  # it warns at the end of each connection by TLS
        loop = asyncio.get_running_loop()
        readiness = Readiness(self.name, self._settings.bus, lambda: self._publisher.ready)
        reload = Reload(self.name, lifecycle, self._settings)
        for descriptor in (self._batches.fileno(), self._publisher.fileno(), lifecycle.fileno()):
            loop.add_reader(descriptor, self._wake)
        exchange = asyncio.create_task(self._stay_connected())
        try:
            while not lifecycle.draining:
                self._turn()
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
            exchange.cancel()
            with suppress(asyncio.CancelledError):
                await exchange
        self._finish()

    def _wake(self) -> None:
        if self._woken is not None and not self._woken.done():
            self._woken.set_result(None)

    async def _wait(self, seconds: float) -> None:
        """Wait for what comes; while a message fills, look at the bus now and then: to wake costs more than to read."""
        if seconds <= 0 or not any(packer.datagrams for packer in self._packers.values()):
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

    def _turn(self) -> None:
        """Take what has come by the bus, and let full messages go."""
        for taken in self._batches.read(TURN_MESSAGES):
            self._pack(taken)
        for stream, count in self._batches.unserved():
            self._outbox.take(stream, count)
            self._outbox.settle(stream, count, UNSERVED)
        now = time.monotonic()
        for key, packer in self._packers.items():
            if packer.datagrams and now >= self._due_at(packer):
                self._close(key, packer, now)

    def _pack(self, taken: Taken) -> None:
        message, batch = taken
        envelope = message.envelope
        key = (envelope.sender, envelope.boot, batch.stream)
        packer, now = self._packers.get(key), time.monotonic()
        if packer is None:
            origin = Origin(self._uplink.site, batch.stream, envelope.sender)
            packer = self._packers[key] = Packer(origin, envelope.boot)
        if not packer.datagrams:
            packer.since = now
            if now - self._packed_at[key] > 4 * self._fill:  # a lone batch goes at once
                packer.since -= self._fill
        self._outbox.take(batch.stream, len(batch))
        packer.add(message, batch)
        if packer.full:
            self._close(key, packer, now)

    @property
    def _fill(self) -> float:
        return self._uplink.fill_ms / 1000

    def _due_at(self, packer: Packer) -> float:
        return packer.since + self._fill

    def _close(self, key: tuple[str, int, str], packer: Packer, now: float) -> None:
        self._packed_at[key] = now
        pack = packer.close()
        self._memory.measure()
        if self._memory.short:
            self._outbox.settle(pack.origin.stream, pack.datagrams, NO_MEMORY)
            return
        if cause := self._outbox.put(pack):
            self._troubles.say("room", _NO_ROOM[cause == "dropped_server_slow"])
        if self._session is not None:
            self._session.wake.set()

    def _due_in(self) -> float:
        """Return the seconds until there is something to do, if nothing comes."""
        if self._batches.more:
            return 0.0
        due = [self._upkeep_at, self._greet_at, self._held.due_at or math.inf]
        due += [self._due_at(packer) for packer in self._packers.values() if packer.datagrams]
        if self._publisher.readable():
            return 0.0
        return max(0.0, min(due) - time.monotonic())

    def _keep_up(self) -> None:
        """Do what is due beside batches."""
        now = time.monotonic()
        if now >= self._greet_at or self._publisher.readable():
            self._greet_at = math.inf
            prefixes = self._feeds.greet()
            if prefixes and self._reporter.asked_for(prefixes):
                self._report()
        if self._held.due_at and now >= self._held.due_at:
            self._held.hand_on(short=self._memory.short)
        if self._kept.stale or self._kept.suspended:
            self._keep()
        if now >= self._upkeep_at:
            self._memory.measure()
            self._batches.keep_up()
            self._feeds.keep_up()
            self._forget_packers(now)
            if self._outbox.room:
                self._troubles.end("room", "there is room again for what waits for JetStream")
            self._account[FILES_RESTORED] += self._kept.renew()
            self._report()
            self._upkeep_at = self._reporter.due_at

    def _forget_packers(self, now: float) -> None:
        for key, packer in list(self._packers.items()):
            if not packer.datagrams and now - self._packed_at[key] > FORGET_SECONDS:
                del self._packers[key], self._packed_at[key]

    def _keep(self) -> None:
        """Keep the counters that there are now; their values are stored as they change."""
        tables = {**self._batches.tables(), **self._sending, **self._arriving, **self._resumed}
        self._kept.keep([], tables, {**self._batches.room(), **_ROOM})

    async def _stay_connected(self) -> None:
        """Connect to one server after the other; use each as long as it lasts."""
        shortest, longest = RECONNECT_SECONDS
        pause = shortest
        for endpoint in rotated(self._uplink.endpoints):
            began = time.monotonic()
            session = Session(self._uplink, self._outbox, self._account, self._troubles)
            try:
                await session.open(endpoint)
                self._account[SERVER_CONNECTIONS] += 1
                self._account[CONNECTED] = 1
                self._session = session
                self._troubles.end("connection", "connected to a NATS server again")
                log.info("connected to a NATS server", server=str(endpoint), site=self._uplink.site)
                await session.run(self._release_overdue, *(receiver.run for receiver in self._receivers))
                self._troubles.say("connection", f"the connection to {endpoint} has ended; trying again")
            except (SessionError, OperatorError) as error:
                self._troubles.say("connection", f"{error}; trying again")
            finally:
                self._account[CONNECTED] = 0
                self._session = None
            pause = shortest if time.monotonic() - began > longest else min(longest, 2 * pause)
            await asyncio.sleep(pause)

    async def _deliver(self, session: Session, arrived: Arrived) -> None:
        """Publish what another site has sent, if it is its turn; acknowledge it once it is on the bus."""
        async with self._turns:
            await self._handle(session, self._arrivals.order(arrived))
        self._greet_at = min(self._greet_at, time.monotonic() + GREET_SECONDS)

    async def _release_overdue(self, session: Session) -> None:
        while True:
            await asyncio.sleep(1.0)
            async with self._turns:
                await self._handle(session, self._arrivals.overdue())

    async def _handle(self, session: Session, ready: list[Arrived]) -> None:
        while ready:
            each = ready.pop(0)
            await self._publish(each)
            await session.acknowledge(each.reply)
            ready[:0] = self._arrivals.follow(each)

    async def _publish(self, arrived: Arrived) -> None:
        feed = self._feeds[arrived.origin.stream]
        for message, (key, total, count) in zip(arrived.batches, keys_of(arrived), strict=True):
            assert message.batch is not None
            had = self._arrivals.had(key, total, count)
            while had < count and not feed.publish(message.batch, had):
                await asyncio.sleep(BUSY_SECONDS)
            self._arrivals.note(key, total, count)
            self._keep_position(unparse_arriving(*key), self._arrivals.positions[key].account())

    def _keep_position(self, name: str, counts: dict[str, int]) -> None:
        kept = self._arriving.get(name)
        if kept is None:
            kept = self._arriving[name] = self._kept.new_counts()
        for counter, count in counts.items():
            if kept[counter] != count:
                kept[counter] = count

    def _report(self) -> None:
        self._arriving = {name: kept for name, kept in self._arriving.items() if name in self._arrivals.accounts()}
        self._reporter.report(self._accounts)

    def _accounts(self) -> Accounts:
        own = {**self._account, "bus_rejected": sum(self._subscriber.rejected.values())}
        return {
            "uplink": own,
            **self._ended,
            **self._feeds.accounts(),
            **self._batches.accounts(),
            **{name: dict(account) for name, account in self._sending.items()},
            **self._arrivals.accounts(),
        }

    async def _drain(self) -> None:
        """Take what still comes by the bus, and give JetStream time to acknowledge what waits."""
        self._batches.hand_over()
        began = time.monotonic()
        quiet_at = began + QUIET_SECONDS
        while (now := time.monotonic()) < min(quiet_at, began + INPUT_SECONDS):
            before = sum(account[TAKEN] for account in self._sending.values())
            self._turn()
            self._keep_up()
            if sum(account[TAKEN] for account in self._sending.values()) > before:
                quiet_at = now + QUIET_SECONDS
            await self._pause(0.01)
        for key, packer in self._packers.items():
            if packer.datagrams:
                self._close(key, packer, now)
        while not self._outbox.empty and self._outbox.connected and time.monotonic() < began + DRAIN_SECONDS:
            await asyncio.sleep(0.01)

    def _finish(self) -> None:
        self._outbox.drop_all(STOPPED)
        self._report()
        log.info("drained", service=self.name, **{name: dict(each) for name, each in self._sending.items()})

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._batches.close()
        self._subscriber.close()
        self._publisher.close()
        self._totals.close()
        self._kept.close()
        self._context.term()


_ROOM: Final = {"sending": (TAKEN, ACKNOWLEDGED, HELD), "arriving": POSITION_COUNTERS, "resumed": (NEXT,)}
_NO_ROOM: Final = (
    "no more may wait for the NATS servers: datagrams for other sites are dropped until one can be reached",
    "JetStream acknowledges too slowly: datagrams for other sites are dropped",
)
