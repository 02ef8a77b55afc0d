"""The journal's loop: batches in from the bus, onto the disk; portions out to readers; what is too much removed."""

import select
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from services.journal import disk_thread
from services.journal.disk_thread import DiskThread, room_on
from services.journal.readers import Readers
from services.journal.stream_journal import StreamJournal
from shared.bus.bodies.journal_messages import JOURNAL_TOPIC, JournalRead
from shared.bus.connection import BusConnection
from shared.bus.kept_counts import KeptFile
from shared.bus.loans.borrower import Borrower
from shared.bus.messages import Datagrams, Message, Status
from shared.bus.zmq_sockets import check_directory
from shared.capture.destination import destination_at
from shared.fanout.resumption import Resumption
from shared.fanout.streams import FollowedStreams
from shared.journal.directory import Lock, streams_in
from shared.journal.encoding import cut
from shared.journal.records import Identity
from shared.journal.retention import Bounds, KnownAge, expired
from shared.ledger.accounts import Accounts, unparse_origin
from shared.ledger.counters import BASELINE, KEPT_LIMIT, REACHED, READERS_REFUSED
from shared.log import get_logger
from shared.process.lifecycle import CANT_CREATE, Lifecycle, OperatorError, Readiness
from shared.process.memory import Memory
from shared.process.reload import Reload
from shared.settings.model import Settings
from shared.settings.own_listeners import FollowedListeners

TURN_MESSAGES: Final = 256
"""Bus messages handled in a row before a reader and housekeeping get their turn."""
FILL_SECONDS: Final = 0.03
"""The longest time for which messages gather: to wake for each one costs as much as to write it."""
READING_SECONDS: Final = 0.01
"""Likewise while somebody reads: a request waits as long."""
FILL_MESSAGES, FILL_ROWS = 16, 2048
"""About as many gather, a small part of a queue of the bus, and of what a worker can lend. Behind a turn that found
twice as many messages none are waited for: this process had to wait for the CPU."""
QUIET_SECONDS: Final = 0.25
INPUT_SECONDS: Final = 1.0
"""After SIGTERM the workers may still flush: input ends when nothing has come for a while, or after this."""
UPKEEP_SECONDS: Final = 1.0
PATIENCE_SECONDS: Final = 5.0
"""Time for the next message of what was held for it: longer than for senders of copies, as nobody waits for it live."""

log = get_logger()


class JournalService:
    """Keeps the journaled streams, and answers readers."""

    def __init__(self, name: str, settings: Settings) -> None:
        self.name, self._settings = name, settings
        self._memory = Memory(settings.journal.memory, "[journal] memory", borrows=True)
        own = settings.journal
        self._limits = Bounds(own.bytes, own.age_seconds, own.min_free)
        self._known_age = KnownAge(own.age_seconds, time.monotonic(), time.time())
        self._streams: dict[str, StreamJournal] = {}
        self._journaled: set[str] = set()
        """Those of them that are kept now."""
        self._positions: dict[str, dict[str, int]] = {}
        """Places that the last journal had reached, by the name of the origin's account."""
        self._listeners: FollowedListeners | None = None

    def __enter__(self) -> Self:
        bus, own = self._settings.bus, self._settings.journal
        check_directory(bus.path)
        self._lock = _lock(own.path)
        self._disk = DiskThread()
        try:
            self._open_streams(self._settings)
        except OperatorError:
            self._disk.close()
            self._lock.close()
            raise
        self._bus = BusConnection(self.name, bus, self._memory, Borrower)
        self._publisher, self._subscriber = self._bus.publisher, self._bus.subscriber
        self._reporter = self._bus.reporter
        self._readers = Readers(self._publisher.publish, self._streams)
        self._followed = FollowedStreams(self._subscriber, bus.path, KeptFile(None))
        self._followed.restore(self._positions)
        self._resumption = Resumption(self.name, self._subscriber, patience=PATIENCE_SECONDS)
        self._subscriber.subscribe(JOURNAL_TOPIC)
        self._followed.subscribe_to(self._journaled)
        self._resumption.hand_over()  # from now on: it may be killed
        self._resumption.begin(self._followed.workers_left, {})
        self._upkeep_at = self._sync_at = 0.0
        self._syncing = False
        return self

    def _open_streams(self, settings: Settings) -> None:
        """Keep the streams of these settings. OperatorError: their directory can't be used; then nothing changes.

        What there is of streams that were kept once can be read, until retention has removed it.
        """
        own = settings.journal
        fresh: dict[str, StreamJournal] = {}
        try:
            there = streams_in(own.path)
        except OSError as error:
            raise OperatorError(CANT_CREATE, f"{own.path}: {error.strerror}; {CURE}") from None
        for name in {*settings.journaled, *there} - self._streams.keys():
            fresh[name] = StreamJournal(name, own.path, own.bytes, self._disk)
            try:
                fresh[name].open()
            except OSError as error:
                raise OperatorError(CANT_CREATE, f"{own.path / name}: {error.strerror}; {CURE}") from None
            for worker, (boot, total) in fresh[name].reached.items():
                self._positions[unparse_origin(worker, boot, name)] = {REACHED: total, BASELINE: total}
        self._streams.update(fresh)
        for name in self._journaled - {*settings.journaled}:
            self._streams[name].seal()
        self._journaled = {*settings.journaled}
        journaled = [stream for stream in settings.streams if stream.journal]
        self._listeners = FollowedListeners(journaled, self._listeners)
        self._set_destinations(self._listeners)

    def _set_destinations(self, listeners: FollowedListeners) -> None:
        for name, places in listeners.places.items():
            self._streams[name].destination = destination_at(*places)

    def _apply_settings(self, settings: Settings) -> None:
        self._open_streams(settings)
        self._followed.subscribe_to(self._journaled)

    def run(self, lifecycle: Lifecycle) -> None:
        """Serve until told to drain, then until the workers are silent."""
        readiness = Readiness(self.name, self._settings.bus, lambda: self._publisher.ready)
        reload = Reload(self.name, lifecycle, self._settings, self._apply_settings)
        directory = str(self._settings.journal.path)
        signals, handled, rows, period, turned_at = lifecycle.fileno(), TURN_MESSAGES, 0, 0.0, 0.0
        with select.epoll() as waking, select.epoll() as filling:
            for descriptor in (self._publisher.fileno(), signals):
                waking.register(descriptor, select.EPOLLIN)
                filling.register(descriptor, select.EPOLLIN)
            waking.register(self._subscriber.fileno(), select.EPOLLIN)
            while not lifecycle.draining:
                most = READING_SECONDS if self._readers.asked_lately else FILL_SECONDS
                if handled == TURN_MESSAGES or self._readers:
                    woken = waking.poll(0)
                elif fill := fill_seconds(handled, rows, period, most):
                    woken = filling.poll(fill)
                else:
                    woken = waking.poll(max(0.0, self._due_at - time.monotonic()))
                if any(descriptor == signals for descriptor, _ in woken):
                    lifecycle.heed()
                now = time.monotonic()
                period, turned_at = now - turned_at, now
                handled, rows = self._turn()
                self._keep_up()
                reload.check()
                readiness.check(directory=directory, streams=sorted(self._journaled))
        self._drain()

    @property
    def _due_at(self) -> float:
        """Return the time at which something is due that no message brings."""
        unsynced = any(stream.unsynced for stream in self._streams.values()) and not self._syncing
        return min(self._upkeep_at, self._reporter.due_at, self._sync_at if unsynced else self._upkeep_at)

    def _turn(self) -> tuple[int, int]:
        """Handle the messages that have come, up to a limit, and one reader; return numbers of messages and rows."""
        handled = rows = 0
        while handled < TURN_MESSAGES and (message := self._subscriber.receive()):
            for each in self._resumption.order(message):
                self._take(each)
            handled += 1
            rows += len(message.batch) if message.batch else 0
        for each in self._resumption.overdue():
            self._take(each)
        for stream in self._streams.values():
            stream.write()
        if self._readers:
            self._readers.answer()
        return handled, rows

    def _take(self, message: Message) -> None:
        body, envelope, batch = message.body, message.envelope, message.batch
        if batch is not None and isinstance(body, Datagrams):
            if self._followed.note_batch(message.topic, envelope, len(batch)) is not None and len(batch):
                identity = Identity(envelope.sender, envelope.boot, envelope.sequence, envelope.total)
                for part in cut(identity, batch):
                    self._streams[batch.stream].append(*part)
        elif isinstance(body, JournalRead):
            self._readers.add(body, memory_short=self._memory.short)
        elif isinstance(body, Status):
            self._followed.reconcile(envelope, body)
        self._followed.pop_unserved()

    def _keep_up(self) -> None:
        """Sync, seal, remove and report what is due."""
        self._memory.measure()
        self._disk.collect()
        now = time.monotonic()
        if now >= self._sync_at and not self._syncing:
            self._sync()
            self._sync_at = now + self._settings.journal.sync_seconds
        if now >= self._upkeep_at:
            self._upkeep_at = now + UPKEEP_SECONDS
            self._hold()
            for stream in self._streams.values():
                stream.keep_up()
            if self._listeners and self._listeners.tick():
                self._set_destinations(self._listeners)
            self._retain()
        fresh = self._publisher.new_subscriptions()
        if now >= self._reporter.due_at or (fresh and self._reporter.asked_for(fresh)):
            self._report()

    def _hold(self) -> None:
        """Make the directory anew where another program has removed it. OperatorError: another journal has it now."""
        try:
            self._lock.hold()
        except BlockingIOError:
            raise _another(self._settings.journal.path) from None
        except OSError:  # writing says so
            pass

    def _sync(self) -> None:
        """Let the disk's thread sync what was written since it did so last."""
        streams = [stream for stream in self._streams.values() if stream.unsynced]
        writers = [writer for stream in streams for writer in stream.writers()]
        if not writers:
            return
        self._syncing = True

        def work() -> disk_thread.Job:
            error = disk_thread.sync(writers)

            def apply() -> None:
                self._syncing = False
                if error:
                    streams[0].note_disk_error(error)

            return apply

        self._disk.submit(work)

    def _retain(self) -> None:
        """Remove what is too much, too old, or in the way of others on the disk."""
        own, streams = self._limits, [*self._streams.values()]
        disks: dict[int, list[StreamJournal]] = {}
        for stream in streams:
            with suppress(OSError):  # its directory is gone: writing says so
                disks.setdefault(stream.directory.stat().st_dev, []).append(stream)
        for there in disks.values():
            with suppress(OSError):
                free, whole = room_on(there[0].directory)
                free += sum(stream.going for stream in there)
                # Of a small disk not all is to stay free.
                self._remove_expired(there, Bounds(0, 0, min(own.free, whole // 2)), free)
        aged = self._known_age.at(time.monotonic(), time.time())
        self._remove_expired(streams, Bounds(own.size, own.age_seconds if aged else 0, 0))

    def _remove_expired(self, streams: Sequence[StreamJournal], bounds: Bounds, free: int = 0) -> None:
        kept = [each for stream in streams for each in stream.kept()]
        for going in expired(kept, bounds, time.time_ns(), free):
            self._streams[going.segment.stream].remove(going)

    def _report(self) -> None:
        self._followed.sort_out_silent_workers()
        self._followed.came_and_gone.clear()  # the forwarder says it
        self._reporter.report(self._accounts)

    def _accounts(self) -> Accounts:
        own = {
            "bus_rejected": sum(self._subscriber.rejected.values()),
            **self._followed.counters,
            READERS_REFUSED: self._readers.refused,
            KEPT_LIMIT: self._limits.size,
        }
        streams = {f"journal/{name}": dict(stream.report()) for name, stream in self._streams.items()}
        return {"journal": own, **streams, **self._followed.accounts()}

    def _drain(self) -> None:
        """Write what still comes, and seal all segments."""
        began = time.monotonic()
        quiet_at = began + QUIET_SECONDS
        while (now := time.monotonic()) < min(quiet_at, began + INPUT_SECONDS):
            if any(self._turn()):
                quiet_at = time.monotonic() + QUIET_SECONDS
            else:
                self._subscriber.socket.poll(int((quiet_at - now) * 1000) + 1)
        for stream in self._streams.values():
            stream.seal()
        if not self._disk.close():
            log.warning("the disk is slow: the next start seals the segments that are open now")
        self._report()
        log.info("drained", service=self.name, accounts={name: s.report() for name, s in self._streams.items()})

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._followed.close()
        self._bus.close()
        self._lock.close()


def fill_seconds(messages: int, rows: int, period: float, most: float = FILL_SECONDS) -> float:
    """Return for how long messages may gather, after as many have come in a period of seconds; 0: none would gather."""
    if not 0 < messages < 2 * FILL_MESSAGES:
        return 0.0
    fill = min(most, period * FILL_MESSAGES / messages, period * FILL_ROWS / max(1, rows))
    return fill if fill * messages > period else 0.0


CURE: Final = "set [journal] directory to one of this user's"


def _lock(directory: Path) -> Lock:
    try:
        return Lock(directory)
    except BlockingIOError:
        raise _another(directory) from None
    except OSError as error:
        raise OperatorError(CANT_CREATE, f"{directory}: {error.strerror}; {CURE}") from None


def _another(directory: Path) -> OperatorError:
    told = f"another journal writes in {directory}: stop it first, or set another [journal] directory"
    return OperatorError(CANT_CREATE, told)
