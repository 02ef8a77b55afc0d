"""The planner on the bus: registry, health and workers in; generations out to the senders; plans to the applier."""

import itertools
import select
import time
from collections import Counter
from types import TracebackType
from typing import Final, Self, get_args

from services.offload.kernel_plan import NO_COPIES
from services.offload.planning.applier_link import ANSWER_SECONDS, ApplierLink
from services.offload.planning.egress_drops import EgressDrops
from services.offload.planning.handover import Handover
from services.offload.planning.mark_watch import MarkWatch
from services.offload.planning.paths import paths_of
from services.offload.planning.planner import Limits, Place, Planned, Served, kernel_plan, make_plan
from services.offload.planning.surroundings import Surroundings
from services.offload.planning.workers import Workers
from shared.bus.bodies.health_message import Health
from shared.bus.bodies.offload_messages import PATHS_TOPIC, OffloadPaths, OffloadReply
from shared.bus.bodies.packing import pack
from shared.bus.connection import BusConnection
from shared.bus.messages import (
    HEALTH_PREFIX,
    REGISTRY_TOPIC,
    Message,
    RegistryChange,
    RegistrySnapshot,
    Status,
    offload_topic,
)
from shared.bus.pieces import Assembler, cut
from shared.bus.zmq_sockets import Requests
from shared.client import Source, Trouble
from shared.fanout.registry_replica import RegistryReplica
from shared.fanout.snapshot_request import SnapshotRequest
from shared.ledger.accounts import Accounts
from shared.ledger.counters import APPLIER, COLLECTORS_SERVED, COPIED, MARKED, PLANS_REFUSED, UNSEEN
from shared.log import get_logger
from shared.process.lifecycle import UNAVAILABLE, Lifecycle, OperatorError, Readiness, next_tick, pause_for
from shared.process.memory import Memory
from shared.process.reload import Reload
from shared.settings.model import Settings

SOURCES: Final[tuple[Source, ...]] = get_args(Source)
REPORTS: Final = tuple(f"status/{service}." for service in ("gateway", "ingest", "forwarder", "transmitter"))
DRAIN_SECONDS: Final = 2.0
"""Time for the applier to answer after SIGTERM: honcho kills after five."""
PLAN_SECONDS: Final = 0.2
"""Plans follow one another no faster: each takes two generations, of which there are ten a second."""
PLAN_SHARE: Final = 10
"""Planning takes at most one part in this many of the time."""
LOOK_SECONDS: Final = 0.25
"""Time by which what no descriptor tells of is noticed late, while something is awaited: sockets, answers."""
TICK_SECONDS: Final = 1.0
KNOWN_SECONDS: Final = 5.0
"""A sender that does not answer for so long is told again, of a new plan."""
FAILED_SECONDS: Final = 2.0
"""A plan that the kernel or the settings have refused is tried again after this time."""

log = get_logger()


class OffloadService:
    """Keeps the kernel's rules as the registry has it. Without an applier it says why, and the senders make all copies.

    With `applier_required` it ends where its applier does: who starts it again brings another one.
    """

    def __init__(self, name: str, settings: Settings, applier: ApplierLink, *, applier_required: bool) -> None:
        self.name = name
        self.settings = settings
        self._applier = applier
        self._applier_required = applier_required
        self._without_applier = False
        self._memory = Memory(settings.offload.memory, "[offload] memory")
        transmitter = settings.transmitter
        self._limits = Limits(
            settings.offload.destinations,
            transmitter.destinations,
            settings.offload.unseen,
            rate_limited=transmitter.frames_per_second > 0,
        )
        self._next_number = itertools.count()
        self._numbers: dict[str, int] = {}
        """Of counters, by what they count."""
        self._counted: Counter[str] = Counter()
        self._last: dict[int, int] = {}
        """Counters as they were last read, by number: one that was removed meanwhile begins at 0."""
        self._planned = Planned({}, {})
        self._refused: Planned | None = None
        self._refusal = ""
        """The reason for which the last plan was refused, until one is not."""
        self._troubles: dict[Source, dict[tuple[str, int], Trouble | None]] = {}
        self._health = {source: Assembler[Health]() for source in SOURCES}
        self._dirty = True
        self._paths_told = self._plans_refused = 0
        self._plan_at = self._tick_at = self._refused_at = self._pending_since = 0.0
        self._relayed: set[Place] = set()
        """Places of the collectors whose copies the forwarder would send."""

    def __enter__(self) -> Self:
        self._bus = BusConnection(self.name, self.settings.bus, self._memory)
        self._publisher, self._subscriber = self._bus.publisher, self._bus.subscriber
        self._reporter = self._bus.reporter
        self._reply = Requests(self.name, self._publisher.boot).topic
        self._replica = RegistryReplica()
        self._snapshot = SnapshotRequest(self._subscriber)
        self._workers = Workers(time.monotonic)
        self._marks = MarkWatch(time.monotonic)
        self._handover = Handover(self.settings.offload.generations, lambda: time.clock_gettime(time.CLOCK_BOOTTIME))
        self._surroundings: Surroundings | None = None
        self._egress = EgressDrops(dict)
        if self._applier.channel is not None:
            self._surroundings = Surroundings(self.settings)
            self._egress = EgressDrops(self._surroundings.dropped)
            for topic in (REGISTRY_TOPIC, HEALTH_PREFIX, *REPORTS, self._reply):
                self._subscriber.subscribe(topic)
        return self

    def run(self, lifecycle: Lifecycle) -> None:
        """Serve until told to drain; then no rules are left."""
        readiness = Readiness(self.name, self.settings.bus, lambda: self._publisher.ready)
        reload = Reload(self.name, lifecycle, self.settings, self._apply_settings)
        with select.epoll() as waking:
            for descriptor in (self._subscriber.fileno(), self._publisher.fileno(), lifecycle.fileno()):
                waking.register(descriptor, select.EPOLLIN)
            if self._surroundings and not self._surroundings.next_hops.blind:
                waking.register(self._surroundings.next_hops.fileno(), select.EPOLLIN)
            if self._applier.channel is not None:
                waking.register(self._applier.channel.fileno(), select.EPOLLIN)
            while not lifecycle.draining:
                waking.poll(self._pause())
                lifecycle.heed()
                self._turn()
                reload.check()
                readiness.check()
        self._drain()

    def _pause(self) -> float:
        """Return how long to wait for messages and events before something else is due."""
        left = pause_for(self._reporter.due_at - time.monotonic())
        if self._publisher.readable():  # the signal of its descriptor was swallowed by what was published
            return 0.0
        return min(left, LOOK_SECONDS) if self._surroundings and self._awaits(self._surroundings) else left

    def _awaits(self, surroundings: Surroundings) -> bool:
        """Return whether anything may be due that no descriptor tells of."""
        undone = self._dirty or self._handover.pending is not None or self._refused is not None
        return undone or self._replica.stale or not surroundings.is_settled(self._relayed)

    def _turn(self) -> None:
        while message := self._subscriber.receive():
            self._note(message)
        if self._replica.stale:
            self._snapshot.ask()
        self._note_subscriptions()
        if self._surroundings is not None:
            if self._applier.ended and not self._without_applier:
                self._go_on_without()
            self._follow_surroundings(self._surroundings)
            self._plan(self._surroundings)
            self._hand_over()
            self._tell()
        if time.monotonic() >= self._reporter.due_at:
            self._count()
            self._tell_paths()
            self._reporter.report(self._accounts)

    def _note(self, message: Message) -> None:
        body, envelope = message.body, message.envelope
        if isinstance(body, RegistrySnapshot | RegistryChange):
            if self._replica.apply_message(envelope, body):
                self._note_registry()
        elif isinstance(body, Health):
            pieces = self._health[body.source].add((envelope.boot, body.report), body)
            if pieces is not None:
                told = {(each.name, each.generation): each.trouble for piece in pieces for each in piece.troubled}
                self._dirty |= told != self._troubles.get(body.source)
                self._troubles[body.source] = told
        elif isinstance(body, Status):
            self._replica.note_status(envelope, body)
            self._dirty |= self._workers.note(envelope, body)
        elif isinstance(body, OffloadReply):
            source: Source = "relay" if envelope.sender.startswith("forwarder.") else "original"
            self._handover.note_reply(source, body.serial)

    def _note_registry(self) -> None:
        self._dirty = True
        collectors = [client for client in self._replica.clients.values() if client.streams]
        self._relayed = {(client.address, client.port) for client in collectors if client.source == "relay"}
        kept = {f"collector/{client.name}" for client in collectors}
        self._numbers = {
            what: number for what, number in self._numbers.items() if what in kept or not what.startswith("collector/")
        }
        self._counted = Counter({what: count for what, count in self._counted.items() if what in self._numbers})

    def _note_subscriptions(self) -> None:
        """Tell a new sender every generation that it may meet, and anybody our status."""
        fresh = self._publisher.new_subscriptions()
        if any(self._reporter.asked_for([prefix]) or PATHS_TOPIC.startswith(prefix) for prefix in fresh):
            self._reporter.due_at = 0.0
        for source in SOURCES:
            topic = offload_topic(source)
            if any(topic.startswith(prefix) for prefix in fresh):
                for told in self._handover.told():
                    for body in told.messages(self._reply):
                        self._publisher.publish(topic, body)

    def _follow_surroundings(self, surroundings: Surroundings) -> None:
        now = time.monotonic()
        self._dirty |= surroundings.apply_events()
        if now >= self._tick_at:
            self._tick_at = next_tick(now, TICK_SECONDS)
            self._dirty |= surroundings.refresh()
            self._handover.expire()
            self._memory.measure()
            self._dirty |= self._workers.expire()
            self._watch_marks()
        self._dirty |= surroundings.sockets_changed(self._relayed)

    def _watch_marks(self) -> None:
        """Compare what the rules have marked with what ingest has read of it."""
        marked: Counter[str] = Counter()
        for what, count in self._counted.items():
            kind, _, stream = what.partition("/")
            if kind == "stream":
                marked[stream.rpartition("/")[0]] += count
        workers = self._workers
        if self._marks.note(marked, workers.marks_read(), workers.received(), workers.reporting):
            self._dirty = True
            if self._marks.reason:
                log.error("the kernel makes no copies", reason=self._marks.reason)

    def _plan(self, surroundings: Surroundings) -> None:
        """Make a plan of what is known now, if anything has changed."""
        if not self._dirty or time.monotonic() < self._plan_at or self._replica.version < 0:
            return
        self._dirty, began = False, time.thread_time()  # while it stands still, it takes no time
        reason = self._applier.reason or self._workers.reason() or self._marks.reason
        facts = surroundings.gather({key: each for told in self._troubles.values() for key, each in told.items()})
        clients = self._replica.clients.values()
        if reason:
            self._planned = Planned({}, {client.name: reason for client in clients if client.streams})
        else:
            self._planned = make_plan(clients, facts, self._limits, self._number)
        self._plan_at = time.monotonic() + max(PLAN_SECONDS, PLAN_SHARE * (time.thread_time() - began))

    def _number(self, what: str) -> int:
        if what not in self._numbers:
            self._numbers[what] = next(self._next_number)
        return self._numbers[what]

    def _hand_over(self) -> None:
        handover, now = self._handover, time.monotonic()
        if self._applier.ended:
            return
        if self._refused is not None and now >= self._refused_at + FAILED_SECONDS:
            self._refused = None
        senders = [source for source in SOURCES if self._publisher.wanted(offload_topic(source))]
        if handover.pending and handover.pending.known_to(senders):
            self._apply(handover.pending.planned)
        if handover.pending and now < self._pending_since + KNOWN_SECONDS:
            return
        live = handover.live.planned if handover.live else Planned({}, {})
        if self._planned.rules == live.rules or self._planned == self._refused:
            return
        handover.begin(self._planned, (max(0, self._replica.boot), max(0, self._replica.revision)))
        self._pending_since = time.monotonic()
        self._tell()

    def _apply(self, planned: Planned) -> None:
        assert self._handover.pending is not None
        self._count()
        answer = self._applier.ask("apply", kernel_plan(planned, self._handover.pending.generations))
        if answer.error and not self._applier.ended:
            self._plans_refused += 1
            log.error("a plan of the kernel's rules was refused", reason=answer.error)
            self._refused, self._refused_at, self._refusal = planned, time.monotonic(), answer.error
            if not self._handover.give_up():
                self._withdraw()
        elif not answer.error:
            self._handover.complete()
            self._refusal = ""

    def _withdraw(self, seconds: float = ANSWER_SECONDS) -> None:
        """Take the rules away: the senders make all copies. The generations that were told of stay known to them."""
        if not self._applier.ask("apply", NO_COPIES, seconds).error:
            self._count()
            self._handover.forget_live()

    def _tell(self) -> None:
        """Publish the generations that are new, to the senders that subscribe."""
        while self._handover.fresh:
            told = self._handover.fresh.pop(0)
            for source in SOURCES:
                for body in told.messages(self._reply):
                    if self._publisher.wanted(offload_topic(source)):
                        self._publisher.publish(offload_topic(source), body)

    def _tell_paths(self) -> None:
        """Publish the way of each collector, to those who ask for it."""
        if self._surroundings is None or not self._publisher.wanted(PATHS_TOPIC):
            return
        clients, as_packets = self._replica.clients.values(), self._surroundings.leaves_as_packets
        told = paths_of(clients, self._served, self._planned.reasons, self._refusal, as_packets)
        pieces = cut(told, lambda path: len(pack(path)))
        self._paths_told += 1
        for number, piece in enumerate(pieces):
            self._publisher.publish(PATHS_TOPIC, OffloadPaths(self._paths_told, number, len(pieces), piece))

    def _go_on_without(self) -> None:
        """Let the senders make all copies from now on: no privilege is left to start another applier with."""
        told = f"{self._applier.reason}; start offload again"
        if self._applier_required:
            raise OperatorError(UNAVAILABLE, told)
        log.error("the kernel makes no copies", reason=told)
        self._without_applier = True
        self._handover.give_up()
        self._handover.forget_live()
        self._dirty = True

    def _count(self) -> None:
        """Read the kernel's counters."""
        before = self._last
        if self._handover.live is not None:
            self._read_counters()
        if self._surroundings:
            links = self._surroundings.links_of(self._sending)
            self._egress.note(links, copied=self._last != before)

    def _read_counters(self) -> None:
        answer = self._applier.ask("count")
        names = {number: what for what, number in self._numbers.items()}
        for number, packets, _ in answer.counters:
            before = self._last.get(number, 0)
            if number in names:  # else of a collector that has left
                self._counted[names[number]] += packets - (before if before <= packets else 0)
        if not answer.error:
            self._last = {number: packets for number, packets, _ in answer.counters}

    def _accounts(self) -> Accounts:
        own = {
            APPLIER: int(self._applier.channel is not None),
            COLLECTORS_SERVED: len(self._served),
            PLANS_REFUSED: self._plans_refused,
            **self._replica.account(),
            "bus_rejected": sum(self._subscriber.rejected.values()),
        }
        counted: Accounts = {}
        for what, count in self._counted.items():
            kind, _, name = what.partition("/")
            if kind == "collector":
                counted[f"rules/{name}"] = {COPIED: count}
            else:
                marked = counted.setdefault(f"marks/{name.rpartition('/')[0]}", {MARKED: 0, UNSEEN: 0})
                marked[MARKED if kind == "stream" else UNSEEN] += count
        return {"offload": own, **counted, **self._egress.accounts()}

    @property
    def _sending(self) -> list[Served]:
        """The collectors that the kernel serves now."""
        served = self._handover.live.planned.served if self._handover.live else {}
        return [each for some in served.values() for each in some]

    @property
    def _served(self) -> set[str]:
        """Their names."""
        return {each.client.name for each in self._sending}

    def _apply_settings(self, settings: Settings) -> None:
        if self._surroundings is not None:
            answer = self._applier.ask("reload")
            if answer.error and not self._applier.ended:
                raise OperatorError(UNAVAILABLE, answer.error)
            self._surroundings.apply_settings(settings)
            self._dirty = True

    def _drain(self) -> None:
        if self._handover.live is not None:
            self._withdraw(DRAIN_SECONDS)
            self._handover.forget_live()
        self._reporter.report(self._accounts)
        log.info("drained", service=self.name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._surroundings is not None:
            self._surroundings.close()
        self._applier.close()
        self._bus.close()
