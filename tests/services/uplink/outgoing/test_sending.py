import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, cast

import pytest
from structlog.testing import capture_logs

from services.uplink.outgoing import cursors
from services.uplink.outgoing.batches import BusBatches
from services.uplink.outgoing.journal_reading import JournalReading
from services.uplink.outgoing.journaled import JournaledStream
from services.uplink.outgoing.sending import Sending
from services.uplink.packs import Pack, read_pack
from shared.bus.bodies.journal_messages import JournalPortion, JournalRead, Replayed
from shared.bus.kept_counts import KeptFile
from shared.bus.messages import Datagrams, Message, Status, datagrams_topic, status_topic
from shared.bus.zmq_sockets import Publisher, Subscriber
from shared.datagrams.batch import DatagramBatch
from shared.datagrams.limits import MAX_ROWS
from shared.fanout.catch_up.journal_questions import SILENT_SECONDS
from shared.fanout.catch_up.pursuit import PursuitState
from shared.ledger.counters import NOT_JOURNALED, TOO_MANY_WORKERS
from shared.ledger.equations import discrepancies
from shared.nats.troubles import Troubles
from shared.process.memory import Memory
from shared.settings.uplink import Uplink
from tests.builders import make_batch, make_envelope
from tests.stack import wait_until

STREAM, TOPIC = "flows", datagrams_topic("flows")
MEMORY: Final = 12 << 20
"""A third of it may wait, and half of that where a journal is behind it."""
Batch = tuple[int, int, DatagramBatch]
"""Sequence number, count before it, and its datagrams."""


class PlayedBus:
    """A bus and its journal, which has each batch that a worker published, whether that came to the uplink or not."""

    sender, boot = "uplink.1", 9

    def __init__(self) -> None:
        self.came: deque[Message] = deque()
        self.journal: dict[str, list[Batch]] = {}
        self._sequences: Counter[str] = Counter()

    def subscribe(self, prefix: str) -> None:
        """Everything comes anyway."""

    unsubscribe = subscribe

    def wanted(self, _: str) -> bool:
        """The journal is there."""
        return True

    def receive(self) -> Message | None:
        """The next message."""
        return self.came.popleft() if self.came else None

    def publish(self, _: str, read: JournalRead) -> bool:
        """Let the journal answer, with all that it has."""
        ends = {each.worker: each.total for each in read.positions}
        replayed = 0
        for worker, batches in self.journal.items():
            for sequence, total, batch in batches:
                if total + len(batch) > ends.get(worker, 0):
                    body = Replayed(read.id, STREAM, batch.received_ns, worker, 1, sequence, total)
                    self._let_come(read.reply, worker, 0, 0, body, batch)
                    replayed += 1
        portion = JournalPortion(read.id, replayed, [], None, at_end=True)
        self._let_come(read.reply, "journal.1", 0, 0, portion)
        return True

    def let_batch_come(self, worker: str, payloads: int, size: int = 10, *, lost: bool = False) -> None:
        """Let a worker publish a batch, which is lost on its way here or comes."""
        batches = self.journal.setdefault(worker, [])
        sequence, total = self._sequences[worker], self.published(worker)
        self._sequences[worker] += 1
        batch = make_batch([bytes(size)] * payloads, stream=STREAM)
        batches.append((sequence, total, batch))
        if not lost:
            self._let_come(TOPIC, worker, sequence, total, Datagrams(STREAM, batch.received_ns), batch)

    def published(self, worker: str) -> int:
        """The count of a worker's datagrams."""
        return sum(len(batch) for _, _, batch in self.journal[worker])

    def let_mark_come(self, worker: str) -> None:
        """Let a worker publish a mark."""
        sequence, empty = self._sequences[worker], make_batch([], stream=STREAM)
        self._sequences[worker] += 1
        self._let_come(TOPIC, worker, sequence, self.published(worker), Datagrams(STREAM, 0), empty)

    def let_status_come(self, worker: str) -> None:
        """Let a worker report."""
        status = Status(worker, 1, time.time_ns(), 1, 0, 1, {f"stream/{STREAM}": {"published": self.published(worker)}})
        self._let_come(status_topic(worker), worker, 0, 0, status)

    def _let_come(
        self, topic: str, worker: str, sequence: int, total: int, body: Any, batch: DatagramBatch | None = None
    ) -> None:
        envelope = make_envelope(sequence, total, sender=worker, boot=1)
        self.came.append(Message(topic, envelope, body, batch))


class Sent:
    """The sending side of an uplink, with a journal behind it, and a JetStream that acknowledges when the test says."""

    def __init__(self, directory: Path) -> None:
        self.bus = bus = PlayedBus()
        kept = KeptFile(None)
        subscriber, publisher = cast(Subscriber, bus), cast(Publisher, bus)
        ignore: Callable[[Any], None] = lambda _: None  # noqa: E731 - a signature for mypy
        self.journal = JournalReading(publisher, subscriber, kept.new_counts, MEMORY)
        self.batches = BusBatches("uplink.1", subscriber, directory, kept, self.journal.handle)
        uplink = Uplink(site="berlin", memory=MEMORY, fill_ms=60_000)
        self.troubles = Troubles()
        rest = Memory(), self.troubles, lambda: None, ignore
        self.sending = Sending(uplink, self.batches, self.journal, kept, *rest)
        self.sending.begin((STREAM,), (STREAM,), {})
        self.sending.outbox.connect()
        self.arrived: list[tuple[str, int]] = []
        """Each datagram that JetStream has acknowledged: its worker, and its place in that one's count."""
        self.sizes: dict[str, int] = {}
        """Bytes of each message, by its number: JetStream keeps the first of each."""

    def acknowledge(self) -> None:
        """Let JetStream take all that is sent."""
        while pack := self.sending.outbox.next():
            self._note(pack)
            self.sending.outbox.acknowledge(pack.number)

    def _note(self, pack: Pack) -> None:
        assert pack.number not in self.sizes
        self.sizes[pack.number] = len(pack.payload)
        for message in read_pack(pack.origin, pack.payload).batches:
            assert message.batch is not None
            start = message.envelope.total
            self.arrived += [(pack.origin.worker, at) for at in range(start, start + len(message.batch))]

    @property
    def account(self) -> Mapping[str, int]:
        """The account of the stream, which adds up."""
        found = self.sending.accounts[f"sending/{STREAM}"]
        assert not list(discrepancies({f"sending/{STREAM}": found}))
        return found

    def give_journal_up(self) -> None:
        """Let the time be over for which a journal is waited for that gives nothing, and go on from the bus."""
        pursued = self.journal.streams[STREAM].pursued
        assert pursued is not None
        pursued.waited = SILENT_SECONDS
        self.follow_journal()

    def follow_journal(self) -> None:
        """Take turns until nothing more is to be read from the journal."""

        def followed() -> bool:
            self.sending.turn()
            return not self.journal.behind

        wait_until(followed, "it is live")

    def settle(self) -> None:
        """Take turns until all that workers published has arrived, once and in order."""
        published = {worker: self.bus.published(worker) for worker in self.bus.journal}

        def settled() -> bool:
            self.sending.turn()
            self.sending.close_all()
            self.acknowledge()
            return len(self.arrived) >= sum(published.values()) and not self.journal.behind

        wait_until(settled, lambda: f"{len(self.arrived)} of {published}, {self.account}")
        for worker, count in published.items():
            assert [at for name, at in self.arrived if name == worker] == [*range(count)]
        account = self.account
        assert account["taken"] == account["acknowledged"] == sum(published.values())
        assert account["held"] == 0


@pytest.fixture
def sent(tmp_path: Path) -> Iterator[Sent]:
    """A site that sends one journaled stream."""
    made = Sent(tmp_path)
    yield made
    made.batches.close()
    del made.sending  # its memory is measured by a descriptor


@pytest.mark.parametrize("tell", [PlayedBus.let_mark_come, PlayedBus.let_status_come])
@pytest.mark.parametrize("goes_on", [True, False])
def test_a_gap_that_no_batch_tells_of_is_read_from_the_journal(
    sent: Sent, tell: Callable[[PlayedBus, str], None], goes_on: bool
) -> None:
    """A mark or a status tells that batches did not come by the bus: other sites get them, also if nothing follows."""
    sent.bus.let_batch_come("ingest.1", 3)
    sent.settle()
    sent.bus.let_batch_come("ingest.1", 5, lost=True)
    tell(sent.bus, "ingest.1")
    if goes_on:
        sent.bus.let_batch_come("ingest.1", 2)
    sent.settle()


@pytest.mark.parametrize("in_one_turn", [True, False])
@pytest.mark.parametrize("goes_on", [True, False])
def test_a_new_worker_that_publishes_before_it_hears_of_the_uplink(
    sent: Sent, in_one_turn: bool, goes_on: bool
) -> None:
    """The journal has what comes before the first mark: other sites get it, and it is in the account once."""
    sent.bus.let_batch_come("ingest.1", 3)
    sent.settle()
    sent.journal.streams[STREAM]._joining_until = 0.0
    sent.bus.let_batch_come("ingest.2", 4, lost=True)
    sent.bus.let_mark_come("ingest.2")
    if not in_one_turn:
        sent.sending.turn()
    sent.bus.let_status_come("ingest.2")
    if goes_on:
        sent.bus.let_batch_come("ingest.2", 2)
    sent.settle()


@pytest.mark.parametrize("lost", [False, True])
def test_a_batch_that_was_lent_whole_goes_in_messages_that_a_server_takes(sent: Sent, lost: bool) -> None:
    """A full batch of 1,200 bytes each is above `max_payload`: it goes in parts, each under a number of its own."""
    sent.bus.let_batch_come("ingest.1", 3)
    sent.settle()
    sent.bus.let_batch_come("ingest.1", MAX_ROWS, 1200, lost=lost)
    if lost:
        sent.bus.let_mark_come("ingest.1")
    sent.settle()
    assert len(sent.sizes) > 3
    assert max(sent.sizes.values()) <= sent.sending.outbox.largest


@pytest.mark.parametrize("at_drain", [False, True])
def test_messages_that_find_no_room_leave_all_of_the_stream_to_the_journal(sent: Sent, at_drain: bool) -> None:
    """Messages of several workers go once, where the first of them finds no room, at a drain too."""
    workers = ["ingest.2", "ingest.3", "ingest.4"]
    for worker in workers:
        sent.bus.let_batch_come(worker, 1)
    for _ in range(4):
        sent.bus.let_batch_come("ingest.1", 15, 30_000)
    sent.sending.turn()
    for worker, count in zip(workers, (10, 2, 2), strict=True):
        sent.bus.let_batch_come(worker, count, 30_000)
    sent.sending.turn()
    before = sent.journal.behind
    if at_drain:
        sent.sending.close_all()
    else:
        sent.sending._fill = 0.0
        sent.sending.turn()
    assert (before, sent.journal.behind) == (False, True)
    sent.settle()
    assert sent.sending.outbox.size == 0


def test_what_went_in_the_turn_that_found_no_more_room_is_in_the_account(sent: Sent) -> None:
    """One turn fills all room and leaves the rest to the journal: what it let go before counts as taken."""
    for _ in range(12):
        sent.bus.let_batch_come("ingest.1", 15, 30_000)
    sent.sending.turn()
    assert sent.journal.behind
    sent.settle()


@pytest.mark.parametrize("later", [False, True])
def test_workers_beyond_the_bound_are_counted(sent: Sent, monkeypatch: pytest.MonkeyPatch, later: bool) -> None:
    """More workers of a journaled stream than have a place: all of the last ones is dropped, counted and said.

    The others' datagrams come as ever, also what they lose on the bus.
    """
    monkeypatch.setattr(cursors, "MAX_WORKERS", 2)
    if later:
        sent.sending.turn()
        sent.journal.streams[STREAM]._joining_until = 0.0
    for worker in ("ingest.1", "ingest.2", "ingest.3"):
        sent.bus.let_batch_come(worker, 3)
    sent.bus.let_batch_come("ingest.4", 5, lost=True)
    sent.bus.let_mark_come("ingest.4")
    if later:
        sent.sending.turn()
    sent.bus.let_batch_come("ingest.4", 4, lost=True)
    sent.bus.let_status_come("ingest.4")
    sent.sending.turn()
    for worker in ("ingest.1", "ingest.3"):
        sent.bus.let_batch_come(worker, 2, lost=True)
        sent.bus.let_batch_come(worker, 1)

    def settled() -> bool:
        sent.sending.turn()
        sent.sending.close_all()
        sent.acknowledge()
        return len(sent.arrived) >= 9 and not sent.journal.behind

    wait_until(settled, lambda: f"{sent.arrived}, {sent.account}")
    assert sorted(sent.arrived) == [*(("ingest.1", at) for at in range(6)), *(("ingest.2", at) for at in range(3))]
    account, refused = sent.account, sum(sent.bus.published(worker) for worker in ("ingest.3", "ingest.4"))
    assert (account["acknowledged"], account[TOO_MANY_WORKERS], account["held"]) == (9, refused, 0)
    assert "stream flows has more than 256 workers" in sent.troubles.now["workers of flows"]


def test_messages_are_as_large_as_the_server_takes(sent: Sent) -> None:
    """A message ends before the batch with which it would be larger than the server takes."""
    sent.sending.outbox.largest = 100_000
    sizes, add = list[int](), sent.sending.outbox.add

    def note(pack: Pack) -> None:
        sizes.append(len(pack.payload))
        add(pack)

    sent.sending.outbox.add = note  # type: ignore[method-assign]
    for _ in range(10):
        sent.bus.let_batch_come("ingest.1", 10, 3000)
    sent.settle()
    assert (len(sizes), max(sizes) <= 100_000) == (4, True)


def test_a_journal_that_was_given_up_is_waited_for_again(sent: Sent, monkeypatch: pytest.MonkeyPatch) -> None:
    """It hung for half a minute, and other sites go without what it alone has; what is to be read later is awaited."""
    sent.bus.let_batch_come("ingest.1", 3)
    sent.settle()
    monkeypatch.setattr(sent.bus, "publish", lambda *_: True)
    sent.bus.let_batch_come("ingest.1", 5, lost=True)
    sent.bus.let_batch_come("ingest.1", 2)
    sent.sending.turn()
    journaled = sent.journal.streams[STREAM]
    assert journaled.pursued is not None
    journaled.pursued.waited = SILENT_SECONDS
    assert [step.missing for step in journaled.settle(gone=True)] == [5]
    assert (journaled.pursued.pursuit.state, journaled.pursued.waited) == (PursuitState.WINDOW, 0.0)


def test_what_came_before_a_gap_goes_without_the_journal(sent: Sent) -> None:
    """A message that is being filled when a gap is found has come by the bus: a journal that hangs does not matter."""
    sent.bus.publish = lambda *_: True  # type: ignore[method-assign]
    sent.bus.let_batch_come("ingest.1", 3)
    sent.sending.turn()
    sent.bus.let_batch_come("ingest.1", 5, lost=True)
    sent.bus.let_batch_come("ingest.1", 2)
    sent.sending.turn()
    assert "room" not in sent.troubles.now
    sent.give_journal_up()
    sent.sending.close_all()
    sent.acknowledge()
    assert sent.arrived == [("ingest.1", at) for at in (0, 1, 2, 8, 9)]
    assert (sent.account["acknowledged"], sent.account[NOT_JOURNALED], sent.account["held"]) == (5, 5, 0)


def test_a_journal_that_gives_nothing_is_told_of_once(sent: Sent) -> None:
    """The log says once that other sites go without what it may have, and how much that was; then that it is over."""
    sent.bus.let_batch_come("ingest.1", 3)
    sent.settle()
    answer, lost = sent.bus.publish, 0
    told = f"the journal has given nothing for {SILENT_SECONDS:g} s: what other sites are to have, and it alone may"
    with capture_logs() as lines:
        for count in (5, 4):
            sent.bus.publish = lambda *_: True  # type: ignore[method-assign]
            sent.bus.let_batch_come("ingest.1", count, lost=True)
            sent.bus.let_batch_come("ingest.1", 1)
            sent.sending.turn()
            sent.give_journal_up()
            sent.sending.keep_up()
            lost += count
            assert sent.account[NOT_JOURNALED] == lost
        sent.bus.publish = answer  # type: ignore[method-assign]
        sent.bus.let_batch_come("ingest.1", 2, lost=True)
        sent.bus.let_mark_come("ingest.1")
        sent.follow_journal()
        sent.sending.keep_up()
    said = [(line["event"], line.get("datagrams")) for line in lines]
    lacked = "other sites go without datagrams that came neither by the bus nor from the journal"
    assert said[0] == (lacked, 5)
    assert said[1][0].startswith(told)
    assert said[2:] == [
        (lacked, 4),
        ("what other sites are to have has been read from the journal", None),
        ("the journal gives again what other sites are to have", None),
    ]


def test_workers_that_have_ended_are_forgotten() -> None:
    """The journal tells of each start of a worker: the window keeps nothing of those that have ended."""
    reading = JournalReading(cast(Publisher, PlayedBus()), cast(Subscriber, PlayedBus()), KeptFile(None).new_counts, 9)
    journaled = JournaledStream(STREAM, dict, KeptFile(None).new_counts, 9)
    reading.streams[STREAM] = journaled
    for boot in range(5):
        journaled.confirm(boot, {("ingest.1", boot): 7})
    assert journaled._window._suspect
    reading.keep_up()
    assert (journaled._window._suspect, journaled._window._opening) == ({}, {})
