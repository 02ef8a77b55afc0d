"""The way out: batches are packed into messages, which wait for JetStream in the outbox.

Batches come by the bus. Those of a journaled stream that find no room are left to the journal, and read from there
later (`journaled`). Of other streams they are dropped and counted.
"""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import replace
from typing import Final

from msgspec import structs

from services.uplink.outgoing.batches import BusBatches
from services.uplink.outgoing.cursors import MAX_WORKERS
from services.uplink.outgoing.journal_reading import JournalReading
from services.uplink.outgoing.journaled import JournaledStream
from services.uplink.outgoing.outbox import Outbox
from services.uplink.packs import FULL, LARGEST_BATCH, UNKNOWN, Packer
from services.uplink.subjects import Origin
from shared.bus.kept_counts import KeptCounts, KeptFile
from shared.bus.messages import VERSION, Datagrams, Envelope, Message, datagrams_topic
from shared.datagrams.batch import DatagramBatch
from shared.datagrams.limits import MAX_PAYLOAD, ROW_SIZE
from shared.fanout.catch_up.journal_questions import SILENT_SECONDS
from shared.fanout.catch_up.pursuit import Step
from shared.ledger.accounts import Accounts
from shared.ledger.counters import (
    ACKNOWLEDGED,
    EXPIRED_UNREAD,
    HELD,
    NO_MEMORY,
    NOT_JOURNALED,
    SERVER_SLOW,
    STOPPED,
    TAKEN,
    TOO_MANY_WORKERS,
    UNSERVED,
    UNSURE,
)
from shared.ledger.equations import dropped
from shared.nats.troubles import Troubles
from shared.process.memory import Memory
from shared.settings.uplink import Uplink

TURN_MESSAGES: Final = 256
SENDING: Final = "sending/"
WAITING_SHARE: Final = 3
"""One part in this many of the memory ceiling may wait for JetStream."""
FORGET_SECONDS: Final = 60.0
"""Time after which a worker that sends nothing is no longer known to the sending side."""

_Key = tuple[str, int, str]
"""Worker, its boot id, and stream."""


class Sending:
    """Packs batches; `offered` is called when a message waits, `note_own` with each batch that comes."""

    def __init__(
        self,
        uplink: Uplink,
        batches: BusBatches,
        journal: JournalReading,
        kept: KeptFile,
        memory: Memory,
        troubles: Troubles,
        offered: Callable[[], None],
        note_own: Callable[[DatagramBatch], None],
    ) -> None:
        self.accounts: dict[str, KeptCounts] = {}
        """By `sending/STREAM`."""
        self.outbox = Outbox(uplink.memory // WAITING_SHARE, uplink.in_flight, self._new_account, time.monotonic)
        self._site = uplink.site
        self._fill = uplink.fill_ms / 1000
        self._batches = batches
        self._kept = kept
        self._memory = memory
        self._troubles = troubles
        self._offered = offered
        self._note_own = note_own
        self._journal = journal
        self.outbox.on_settled = journal.note_settled
        self._packers: dict[_Key, Packer] = {}
        self._packed_at: defaultdict[_Key, float] = defaultdict(lambda: -math.inf)

    def _new_account(self, stream: str) -> KeptCounts:
        self.accounts[f"{SENDING}{stream}"] = account = self._kept.new_counts()
        return account

    def begin(
        self, streams: tuple[str, ...], journaled: Container[str], tables: Mapping[str, Mapping[str, int]]
    ) -> None:
        """Send these streams, and go on with the accounts and positions that the last process has left."""
        for name, counts in tables.items():
            if name.startswith(SENDING):
                account = self.outbox.accounts[name.removeprefix(SENDING)]
                account.update(counts)
        self._batches.begin(streams, tables)
        owed = self._journal.begin([each for each in streams if each in journaled], self._batches, tables)
        for stream in streams:
            account = self.outbox.accounts[stream]  # there from the start
            if stream in owed:
                account[HELD] = owed[stream]
                account[TAKEN] = owed[stream] + account[ACKNOWLEDGED] + dropped(account)
        for stream, account in self.outbox.accounts.items():
            if stream not in owed:
                account[UNSURE] += account[HELD]  # it was in the hands of the last process when that was killed
                account[HELD] = 0

    @property
    def filling(self) -> bool:
        """Return whether any message is being filled, and nothing else is awaited."""
        return not self._journal.awaits and any(packer.datagrams for packer in self._packers.values())

    @property
    def due_at(self) -> float:
        """Return the time at which a message is to go, however full it is, or the journal is to be looked at."""
        due = [self._due_at(packer) for packer in self._packers.values() if packer.datagrams]
        return min([*due, self._journal.due_at])

    def turn(self) -> None:
        """Take what has come by the bus, read on in the journal, and let full messages go."""
        for taken in self._batches.read(TURN_MESSAGES):
            self._note_gaps()
            stream, envelope = taken.batch.stream, taken.message.envelope
            self._note_own(taken.batch)
            self._close_earlier(envelope, stream)
            journaled = self._journal.streams.get(stream)
            if journaled is None:
                self.outbox.take(stream, len(taken.batch))
            elif journaled.is_broken_by(taken):
                self._defer_gap(journaled)
            if journaled and journaled.pursued:
                journaled.keep(taken)
            elif journaled is None or not journaled.refuses((envelope.sender, envelope.boot)):
                self._pack(taken.message, taken.batch)
        self._note_gaps()
        self._note_owed()
        for journaled, step in self._journal.steps(self._has_room):
            self._take_past(journaled, step)
        now = time.monotonic()
        for key, packer in self._filling():
            if now >= self._due_at(packer):
                self._close(key, packer, now)

    def _filling(self) -> Iterator[tuple[_Key, Packer]]:
        """Yield the messages that are being filled: to close one may leave others to the journal."""
        for key, packer in list(self._packers.items()):
            if packer.datagrams and self._packers.get(key) is packer:
                yield key, packer

    def _note_gaps(self) -> None:
        """Leave what is missing, and no batch tells of, to the journal; count what that can't have."""
        gaps = self._batches.pop_gaps()
        for each in self._batches.unserved():
            if each.published and each.stream in self._journal.streams:
                gaps.add(each.stream)
            else:
                self._take_lost(each.stream, each.datagrams, UNSERVED)
        for stream in gaps:
            if (journaled := self._journal.streams.get(stream)) and journaled.pursued is None:
                self._defer_gap(journaled)

    def _note_owed(self) -> None:
        for stream, journaled in self._journal.streams.items():
            owed = journaled.newly_owed()
            self.outbox.take(stream, owed.datagrams)
            self._take_lost(stream, owed.lost, UNSERVED)
            if owed.refused:
                self._take_lost(stream, owed.refused, TOO_MANY_WORKERS)
                told = (
                    f"stream {stream} has more than {MAX_WORKERS} workers: others' datagrams do not go to other sites"
                )
                self._troubles.say(f"workers of {stream}", told)

    def _take_lost(self, stream: str, datagrams: int, cause: str) -> None:
        self.outbox.take(stream, datagrams)
        self.outbox.settle(stream, datagrams, cause)

    def _pack(self, message: Message, batch: DatagramBatch) -> None:
        """Let a batch into messages: into several where it was lent whole, and is larger than a server takes."""
        total = message.envelope.total
        for part in batch.parts(MAX_PAYLOAD):
            if part is not batch:
                message = replace(message, envelope=structs.replace(message.envelope, total=total))
            if not self._pack_part(message, part):
                return
            total += len(part)

    def _pack_part(self, message: Message, batch: DatagramBatch) -> bool:
        """Let a batch into the message that is being filled; return False if what comes is left to the journal."""
        envelope = message.envelope
        key = (envelope.sender, envelope.boot, batch.stream)
        packer, now = self._packers.get(key), time.monotonic()
        if packer is None:
            origin = Origin(self._site, batch.stream, envelope.sender)
            journaled = self._journal.streams.get(batch.stream)
            after = journaled.cursors.passed(key[:2]) if journaled else UNKNOWN
            packer = self._packers[key] = Packer(origin, envelope.boot, after)
        if packer.datagrams and packer.size + LARGEST_BATCH > self.outbox.largest:  # else any batch finds room
            size = ROW_SIZE * len(batch) + int(batch.lengths.sum())
            if packer.size + size > self.outbox.largest:
                self._close(key, packer, now)
                if self._packers.get(key) is not packer:
                    return False
        if not packer.datagrams:
            packer.since = now
            if now - self._packed_at[key] > 4 * self._fill:  # a lone batch goes at once
                packer.since -= self._fill
        packer.add(message, batch)
        if packer.full:
            self._close(key, packer, now)
        return self._packers.get(key) is packer

    def _close_earlier(self, envelope: Envelope, stream: str) -> None:
        """Let messages of a worker's earlier starts go before the first of this one."""
        worker, boot = envelope.sender, envelope.boot
        if (worker, boot, stream) in self._packers:
            return
        for key, packer in self._filling():
            if (key[0], key[2]) == (worker, stream) and key[1] != boot:
                self._close(key, packer, time.monotonic())

    def _has_room(self) -> bool:
        """Return whether there is room for a batch out of the journal, once what is being filled has gone."""
        filling = sum(packer.size for packer in self._packers.values())
        return self.outbox.half > filling + FULL + LARGEST_BATCH and not self._memory.short

    def _take_past(self, journaled: JournaledStream, step: Step) -> None:
        """Take what goes next out of the journal; count what it does not have."""
        stream, ((name, boot), sequence, _, _), batch = journaled.stream, step.numbered, step.batch
        self.outbox.take(stream, step.discovered)
        if step.missing:
            key = name, boot, stream
            if (packer := self._packers.get(key)) and packer.datagrams:
                self._close(key, packer, time.monotonic())
            journaled.cursors.skip(key[:2], step.stop - (len(batch) if batch is not None else 0))
            self.outbox.settle(stream, step.expired, EXPIRED_UNREAD)
            self.outbox.settle(stream, step.missing - step.expired, NOT_JOURNALED)
        if batch is not None:
            total = step.stop - len(batch)
            envelope = Envelope(VERSION, "datagrams", name, boot, sequence, total)
            self._close_earlier(envelope, stream)
            self._pack(Message(datagrams_topic(stream), envelope, Datagrams(stream, batch.received_ns), batch), batch)

    def _defer_gap(self, journaled: JournaledStream) -> None:
        """Leave what is missing to the journal, and all that comes behind it; what has come before it goes."""
        for key, packer in self._filling():
            if key[2] == journaled.stream:
                self._close(key, packer, time.monotonic())
        if journaled.pursued is None:
            self._read_past(journaled)

    def _defer(self, journaled: JournaledStream) -> None:
        """Leave what has found no room to the journal, and all that comes behind it."""
        for key in [key for key in self._packers if key[2] == journaled.stream]:
            del self._packers[key]
        self._read_past(journaled)
        self._troubles.say("room", "datagrams for other sites wait in the journal until there is room for them")

    def _read_past(self, journaled: JournaledStream) -> None:
        self._note_owed()  # what goes by now would count as read from the journal before it came
        journaled.defer()

    def _due_at(self, packer: Packer) -> float:
        return packer.since + self._fill

    def _close(self, key: _Key, packer: Packer, now: float) -> None:
        self._packed_at[key] = now
        pack = packer.close()
        self._memory.measure()
        if journaled := self._journal.streams.get(pack.origin.stream):
            full = self._memory.short or self.outbox.half < len(pack.payload)
            if full and journaled.pursued is None:
                self._defer(journaled)
                return
            journaled.cursors.put(pack)
            self.outbox.add(pack)
        elif self._memory.short:
            self.outbox.settle(pack.origin.stream, pack.datagrams, NO_MEMORY)
            return
        elif cause := self.outbox.put(pack):
            self._troubles.say("room", _NO_ROOM[cause == SERVER_SLOW])
        self._offered()

    def close_all(self) -> None:
        """Let all messages go that are being filled."""
        now = time.monotonic()
        for key, packer in self._filling():
            self._close(key, packer, now)

    def keep_up(self) -> None:
        """Do what is due each second."""
        self._batches.keep_up()
        self._journal.keep_up()
        now = time.monotonic()
        for key, packer in list(self._packers.items()):
            if not packer.datagrams and now - self._packed_at[key] > FORGET_SECONDS:
                del self._packers[key], self._packed_at[key]
        if self._journal.given_up:
            self._troubles.say("journal", _GIVEN_UP)
        else:
            self._troubles.end("journal", "the journal gives again what other sites are to have")
        if self.outbox.room and not self._journal.behind:
            self._troubles.end("room", "there is room again for what waits for JetStream")

    def taken(self) -> int:
        """Return the datagrams that have come to be sent, of all streams."""
        return sum(account[TAKEN] for account in self.accounts.values())

    def finish(self) -> None:
        """Drop what is left, as this process ends; what is in the journal the next one sends."""
        self.outbox.drop_all(STOPPED, self._journal.streams)

    def tables(self) -> dict[str, KeptCounts]:
        """Return what is to be kept for the next process."""
        return {**self._batches.tables(), **self.accounts, **self._journal.tables()}

    def report(self) -> Accounts:
        """Return the accounts of what came by the bus, and of what became of it."""
        return {**self._batches.accounts(), **{name: dict(account) for name, account in self.accounts.items()}}


_GIVEN_UP: Final = (
    f"the journal has given nothing for {SILENT_SECONDS:g} s: what other sites are to have, and it alone may have, is "
    "dropped_not_journaled; see whether the journal runs, and look at its log, and at its disk"
)
_NO_ROOM: Final = (
    "no more may wait for the NATS servers: datagrams for other sites are dropped until one can be reached",
    "JetStream acknowledges too slowly: datagrams for other sites are dropped",
)
