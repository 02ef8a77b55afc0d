"""The loop of a service that sends copies: registry and batches in from the bus; copies, accounts and answers out.

Forwarder and transmitter are such services. They reach collectors in different ways, and serve those collectors of the
registry whose `source` is theirs.
"""

import select
import time
from collections.abc import Iterable
from typing import Final, Self

from shared.bus.bodies.nodes_message import Nodes
from shared.bus.bodies.offload_messages import KernelCopies
from shared.bus.bodies.template_messages import Renewals, Templates
from shared.bus.connection import BusConnection
from shared.bus.kept_counts import KeptFile, Sheet
from shared.bus.loans.borrower import Borrower
from shared.bus.messages import (
    Body,
    Datagrams,
    Message,
    RegistryChange,
    RegistrySnapshot,
    ServeRequest,
    Status,
)
from shared.bus.zmq_sockets import check_directory
from shared.datagrams.batch import DatagramBatch
from shared.datagrams.gathered import Gathered
from shared.datagrams.routing import Selection
from shared.fanout.awaited_rules import AwaitedRules
from shared.fanout.catch_up.catch_up import JOURNAL, CatchUp
from shared.fanout.collectors import Collectors
from shared.fanout.health_report import HealthReporter
from shared.fanout.kernel_copies import KernelRules
from shared.fanout.registry_replica import RegistryReplica
from shared.fanout.resumption import Resumption
from shared.fanout.sending.copy_sender import CopySender
from shared.fanout.serve_requests import ServeRequests
from shared.fanout.served_collector import MARKS, D
from shared.fanout.snapshot_request import SnapshotRequest
from shared.fanout.streams import ORIGIN_COUNTERS, FollowedStreams
from shared.fanout.templates import TemplateDelivery
from shared.fanout.waiting_batches import WaitingBatches
from shared.ledger.accounts import Accounts
from shared.ledger.counters import COLLECTOR_COUNTERS, FILES_RESTORED, STOPPED
from shared.log import get_logger
from shared.process.lifecycle import CANT_CREATE, Lifecycle, OperatorError, Readiness, pause_for
from shared.process.reload import Reload
from shared.serving_nodes import Owners
from shared.settings.model import Settings

TURN_MESSAGES: Final = 256
"""Bus messages handled in a row before housekeeping gets its turn."""
SOON_SECONDS: Final = 0.005
"""Time after which what could not be done at once is tried again: to apply a registry, or to answer."""
UNMEASURED: Final = 1 << 20
"""Bytes of payload that may come before the process's memory is measured again."""
BUSY_SECONDS: Final = 0.05
"""Time for which collectors that catch up wait while live copies do."""
APPLY_SHARE: Final = 10
"""Applying registry changes takes at most one part in this many of the loop's time; changes wait for each other."""
QUIET_SECONDS: Final = 0.25
INPUT_SECONDS: Final = 2.0
"""After SIGTERM input ends when workers hold for the next process and nothing has come for a while, or after this."""
DRAIN_SECONDS: Final = 2.75
"""Time after SIGTERM for all of the drain: the process ends within 4 s though ZeroMQ may linger for one more."""

log = get_logger()


class CopyService(CopySender[D]):
    """The loop of a sender of copies."""

    def __enter__(self) -> Self:
        bus = self.settings.bus
        kind = self.name.partition(".")[0]
        check_directory(bus.path)  # makes it for the file of accounts, where the broker has not yet
        self._kept = KeptFile(self.accounts_file)
        try:
            self._left = self._kept.open()
        except BlockingIOError:
            told = f"another {kind} runs on {bus.path}: collectors would get each copy twice; stop it first"
            raise OperatorError(CANT_CREATE, told) from None
        self._bus = BusConnection(self.name, bus, self.memory, Borrower)
        self._publisher, self._subscriber = self._bus.publisher, self._bus.subscriber
        self._reporter = self._bus.reporter
        self._health = HealthReporter(self._publisher, self.source)
        self._replica = RegistryReplica(Owners.of(self.settings.uplink))
        self._snapshot = SnapshotRequest(self._subscriber)
        self._keep_at = 0.0
        self._streams = FollowedStreams(self._subscriber, bus.path, self._kept)
        self._resumption = Resumption(self.name, self._subscriber, self._kept.new_counts)
        rules, new_counts = KernelRules(self.source), self._kept.new_counts
        names = [stream.name for stream in self.settings.streams]
        self._collectors = Collectors(names, self._streams.published, self.reach, rules, new_counts)
        self._templates = TemplateDelivery(self._subscriber, self._collectors, self.send, self._send_all)
        self._templates.set_streams(self.settings.streams)
        self._catch_up = CatchUp(
            *(self._publisher, self._subscriber, self._streams, self._collectors, self._kept),
            *(self._send_past, self._keep_new, self._templates),
        )
        self._catch_up.use(self.settings)
        self._awaited = AwaitedRules(rules, self._publisher, self._replica)
        self._requests = ServeRequests(self._publisher, self._replica)
        self._serving, self._restored = -1, 0
        self._apply_at = self._work_at = self._upkeep_at = 0.0
        self._more = False
        """True if there may be messages that no descriptor tells of: ZeroMQ's signals once."""
        self._taken = 0
        """Bytes of payload that have come since the memory was measured."""
        self._idle = True
        """True if no copies were sent since the collectors were examined."""
        self._gathered = WaitingBatches()
        for topic in self.topics():
            self._subscriber.subscribe(topic)
        return self

    def publish(self, topic: str, body: Body) -> None:
        """Put a message of a kind that is this service's alone on the bus."""
        self._publisher.publish(topic, body)

    def apply_settings(self, settings: Settings) -> None:
        """Use the streams of these settings."""
        self._collectors.set_streams(stream.name for stream in settings.streams)
        self._templates.set_streams(settings.streams)
        self._catch_up.use(settings)
        self._subscribe()

    def _subscribe(self) -> None:
        """Follow the streams that collectors want, also those of other nodes, which may be ours in a moment."""
        wanted = self._collectors.streams_wanted()
        self._catch_up.keep_to(wanted)  # while it is known how much waits of the others
        self._streams.subscribe_to(wanted)
        self._catch_up.rings.keep(wanted if self.settings.uplink.nodes else ())

    def run(self, lifecycle: Lifecycle) -> None:
        """Serve until told to drain, then until the workers are silent."""
        readiness = Readiness(self.name, self.settings.bus, lambda: self._publisher.ready)
        reload = Reload(self.name, lifecycle, self.settings, self.apply_settings)
        with select.epoll() as waking:
            messages, subscriptions = self._subscriber.fileno(), self._publisher.fileno()
            for descriptor in (messages, subscriptions, lifecycle.fileno(), *self.descriptors()):
                waking.register(descriptor, select.EPOLLIN)
            while not lifecycle.draining:
                due_at = min(self._upkeep_at, self._catch_up.due_at)
                self._collectors.shares.begin_wait()
                woken = waking.poll(0 if self._more else pause_for(due_at - time.monotonic()))
                self._collectors.shares.end_wait()
                if any(descriptor != messages for descriptor, _ in woken):
                    self._upkeep_at = 0.0
                    lifecycle.heed()
                self._turn()
                if self._must_keep_up:
                    self._keep_up()
                    reload.check()
                    readiness.check()
        self._drain()

    def _turn(self) -> int:
        """Handle the messages that have come, up to a limit; return their number."""
        handled = 0
        while handled < TURN_MESSAGES and (message := self._subscriber.receive()):
            for each in self._resumption.order(message):
                self._take_all(self._awaited.order(each))
            handled += 1
        for each in self._resumption.overdue():
            self._take_all(self._awaited.order(each))
        self._take_all(self._awaited.overdue())
        self._send_all()
        self._more = handled == TURN_MESSAGES
        self._send_owed()
        return handled

    def _send_owed(self) -> None:
        """Go on with collectors that catch up, if that is due; live copies and templates go first."""
        late = time.monotonic() - self._catch_up.due_at
        if late >= (BUSY_SECONDS if self._more else 0.0):
            self._catch_up.step()

    @property
    def _must_keep_up(self) -> bool:
        """Return whether anything beside messages is due, or may be by what they have brought."""
        if self.held or self._kept.stale or self._taken >= UNMEASURED:
            return True
        return time.monotonic() >= self._upkeep_at

    def _keep_up(self) -> None:
        """Do what is due beside sending copies, and set the time at which something will be."""
        self._taken = 0
        if self.memory.measure() and not self._catch_up.rings.halve(self.memory):
            self.held.halve(self.memory)
        self._resume_keeping()
        self._work_at = time.monotonic() + self.work()
        if self._replica.stale:
            self._snapshot.ask()
        if self._serving != self._replica.version:
            self._apply()
        self._templates.settle(self._streams)
        if self._requests and self._serving == self._replica.version and self._streams.flowing:
            self._requests.answer(self._templates.joining_since)
        if self._awaited and self._serving == self._replica.version and not self._templates:
            self._awaited.answer()
        fresh, now = self._publisher.new_subscriptions(), time.monotonic()
        if now >= self._health.due_at or (fresh and self._health.asked_for(fresh)):
            self._collectors.refresh()
            self._catch_up.look_for_absent()
            serving, flowing = bool(self._collectors.clients), self._streams.flowing
            self._health.report(self._collectors.examine, flowing=flowing, idle=self._idle, serving=serving)
            self._idle = True
        if now >= self._reporter.due_at or (fresh and self._reporter.asked_for(fresh)):
            self._report()
        if fresh:
            self._catch_up.tell_again(fresh)
        if self._kept.stale and self._serving >= 0 and now >= self._keep_at:
            self._keep()
        self._upkeep_at = min(self._reporter.due_at, self._health.due_at, self._work_at)
        if self._requests or self._awaited or self._templates or self._serving != self._replica.version:
            self._upkeep_at = min(self._upkeep_at, now + SOON_SECONDS)
        if self._publisher.readable():  # the signal of its descriptor was swallowed by what was published
            self._upkeep_at = 0.0

    def _take_all(self, messages: Iterable[Message]) -> None:
        for message in messages:
            self._take(message)

    def _take(self, message: Message) -> None:
        if self._catch_up.handle(message):
            return
        counted = self._catch_up.owed.counted()
        self._handle(message)
        if counted:
            self._catch_up.owed.note_counted(counted)

    def _handle(self, message: Message) -> None:
        body, envelope = message.body, message.envelope
        worker = envelope.sender, envelope.boot
        if not (message.batch or isinstance(body, Status)) or self._requests:
            self._upkeep_at = 0.0  # for what becomes due by it, such as an answer
        if message.batch is not None:
            self._take_batch(message, message.batch)
        elif isinstance(body, Templates | Renewals):
            self._templates.take(message)
        elif isinstance(body, RegistrySnapshot | RegistryChange | Nodes):
            if isinstance(body, Nodes):
                self._collectors.note_nodes(body.nodes)
            self._replica.apply_message(envelope, body)
        elif isinstance(body, ServeRequest):
            self._requests.add(envelope.boot, body)
        elif isinstance(body, KernelCopies):
            self._send_all()  # what has come before was copied by other rules of the same number
            self._take_all(self._awaited.note(envelope, body))
        elif isinstance(body, Status) and envelope.sender.startswith(JOURNAL):
            self._catch_up.rings.confirm(envelope, body)
        elif isinstance(body, Status):
            self._send_all()  # before what is missing behind it is noted
            for stream, missed in self._streams.reconcile(envelope, body).items():
                self._collectors.count_missed(stream, missed, self._templates.joining(stream, worker))
        else:
            self.handle_message(message)
        for unserved in self._streams.pop_unserved() if self._streams.unserved else ():
            self._collectors.count_unserved(unserved, self._templates.joining(unserved.stream, worker))

    def _take_batch(self, message: Message, batch: DatagramBatch) -> None:
        """Let a batch wait for others of its stream that have come too, up to the limits."""
        stream, envelope = batch.stream, message.envelope
        joining = self._templates.before_batch(stream, (envelope.sender, envelope.boot))
        together = self._gathered.has_room(batch, joining)
        if not (together and self._streams.follows(message.topic, envelope)):
            self._send_all()  # before this one is noted, and what is missing between them
        if missed := self._streams.note_batch(message.topic, envelope, len(batch)):
            self._collectors.count_missed(stream, missed, joining)
        if missed is not None and len(batch):
            if isinstance(message.body, Datagrams):
                self._catch_up.note_live(envelope, message.body, batch, joining)
            self._taken += len(batch.payload)
            if not self._gathered.add(batch, joining):
                self._send_gathered(stream)

    def _send_all(self) -> None:
        for stream in self._gathered.streams:
            self._send_gathered(stream)

    def _send_gathered(self, stream: str) -> None:
        if self._idle:
            self._idle = False
            self._health.hasten()
            self._upkeep_at = min(self._upkeep_at, self._health.due_at)
        self._catch_up.before_sending(stream)
        self._resume_keeping()
        gathered = self._gathered.gather(stream)
        self.send(gathered, self._collectors.route(gathered, self._gathered.joining))
        self._catch_up.after_sending(stream)

    def _send_past(self, batch: Gathered, routed: list[tuple[D, Selection]]) -> None:
        """Send a collector datagrams out of the journal."""
        self._idle = False
        self.send(batch, routed)

    def _apply(self) -> None:
        """Serve the registry as it is now; if that was done a moment ago, wait for changes, unless nodes hand over."""
        began = time.monotonic()
        if self._serving == self._replica.version or (began < self._apply_at and not self._replica.handing_over):
            return
        self._kept.suspend()
        if first := self._serving < 0:
            self._restore()
        self._serving = self._replica.version
        clients, elsewhere = self._replica.split(self.source)
        self._catch_up.note_leaving(clients)
        self._collectors.replace(clients.values(), elsewhere.values())
        self._subscribe()
        self._catch_up.follow(clients, first=first)
        self._templates.follow_collectors(self._replica.revision)
        if first:
            self._resumption.begin(self._streams.workers_left, self._left.tables)
            self._left = Sheet()
        self._keep()
        self._health.report(self._collectors.examine, serving=bool(clients))  # before any answer that one is served
        self._apply_at = time.monotonic() + APPLY_SHARE * (time.monotonic() - began)

    def _restore(self) -> None:
        """Go on with the accounts and positions of the last process of this name."""
        self._streams.restore(self._left.tables)
        self._catch_up.restore(self._left.clients, self._left.tables)
        self._collectors.restore(self._left)

    def _resume_keeping(self) -> None:
        """Keep counters again before anything is sent: of each copy sent the file tells that it was taken."""
        if self._kept.suspended:
            self._keep()

    def _keep_new(self) -> None:
        """Keep counters that have no place in the file yet: a collector's own place would be lost with this process."""
        if self._kept.stale:
            self._keep()

    def _keep(self) -> None:
        """Keep the counters that there are now; their values are stored as they change."""
        began = time.monotonic()
        parts = (self._resumption, self._streams, self._catch_up, self._collectors)
        tables = {name: table for part in parts for name, table in part.tables().items()}
        room = {"collector": COLLECTOR_COUNTERS, "marks": MARKS, "origin": ORIGIN_COUNTERS}
        self._kept.keep(self._collectors.clients, tables, room)
        self._keep_at = time.monotonic() + APPLY_SHARE * (time.monotonic() - began)

    def _report(self, *, ended: bool = False) -> None:
        self._replica.check_nodes()
        self._restored += self._kept.renew()
        self._streams.sort_out_silent_workers()
        self._catch_up.report()
        self._streams.tell_of_workers(silently=self.source != "relay")  # one of the two senders says it
        self._reporter.report(self._accounts, ended=ended)

    def _accounts(self) -> Accounts:
        service = {
            **self._replica.account(),
            "bus_rejected": sum(self._subscriber.rejected.values()),
            **self._streams.counters,
            **self._collectors.counters,
            FILES_RESTORED: self._restored,
            **self.own_account(),
        }
        streams, collectors, past = (each.accounts() for each in (self._streams, self._collectors, self._catch_up.owed))
        return {self.name.partition(".")[0]: service, **streams, **collectors, **past}

    def _drain(self) -> None:
        """Send what still comes, then what waits for collectors; drop and count the rest before the last report."""
        if self._collectors.clients:
            self._resumption.hand_over(self._streams.publishing)
        began = heard_at = time.monotonic()
        while (now := time.monotonic()) < began + INPUT_SECONDS:
            if now >= heard_at + QUIET_SECONDS and self._resumption.handed_over(self._streams.publishing):
                break
            self._keep_up()
            if self._turn():
                heard_at = time.monotonic()
            else:
                self._collectors.shares.begin_wait()
                self._subscriber.socket.poll(self._pause_ms(heard_at + QUIET_SECONDS - now))
                self._collectors.shares.end_wait()
        self._take_all(self._awaited.give_up())
        self._send_all()
        self._collectors.departed.close_all()
        while self.held and (now := time.monotonic()) < began + DRAIN_SECONDS:
            self._work_at = now + self.work()
            time.sleep(self._pause_ms(began + DRAIN_SECONDS - now) / 1000)
        self.held.clear(STOPPED)
        self._report(ended=True)
        log.info("drained", service=self.name, accounts=self._collectors.accounts())

    def _pause_ms(self, most: float) -> int:
        """Milliseconds until there is work to do, `most` seconds at most."""
        return int(max(0.0, min(most, self._work_at - time.monotonic())) * 1000) + 1

    def __exit__(self, *_: object) -> None:
        self._collectors.close()
        self._streams.close()
        self._kept.close()
        self._bus.close()
