"""Those who read in the journal: when they ask, and how small batches are joined for them."""

from dataclasses import replace
from itertools import chain

from hypothesis import given
from hypothesis import strategies as st

from services.journal.readers import JOINED_NS, JOINED_ROWS, LATELY_SECONDS, Readers, join
from shared.bus.bodies.fields import REPLAY_PREFIX
from shared.bus.bodies.journal_messages import JournalRead
from shared.datagrams.limits import MAX_PAYLOAD, MAX_ROWS
from shared.journal.encoding import Numbered, cut
from shared.journal.records import Identity
from tests.builders import make_batch

JUMPS_NS = st.sampled_from((0, 1_000_000, JOINED_NS // 2, JOINED_NS, 2 * JOINED_NS))
STEPS = st.lists(st.tuples(st.integers(0, 1), st.booleans(), st.integers(1, JOINED_ROWS), JUMPS_NS), max_size=40)


@given(STEPS)
def test_joined_batches_have_all_and_nothing_between_that_is_missing(steps: list[tuple[int, bool, int, int]]) -> None:
    """Each has the rows of batches that follow each other, the first's count and time, and the last's number."""
    batches: list[Numbered] = []
    totals, now = [0, 0], 1_700_000_000_000_000_000
    for number, (worker, missing, count, jump) in enumerate(steps):
        now += jump
        totals[worker] += missing
        rows = [b"%d/%d" % (totals[worker], row) for row in range(count)]
        batches.append(
            (Identity(f"ingest.{worker}", 7, number, totals[worker]), replace(make_batch(rows), received_ns=now))
        )
        totals[worker] += count
    left = list(batches)
    for identity, batch in join(batches):
        (first, oldest), taken = left[0], 0
        assert (identity.worker, identity.boot, identity.total) == (first.worker, first.boot, first.total)
        assert batch.received_ns == oldest.received_ns
        rows_of = []
        while taken < len(batch):
            last, part = left.pop(0)
            assert (last.worker, last.total) == (first.worker, first.total + taken)
            assert part.received_ns <= oldest.received_ns + JOINED_NS
            rows_of += list(part.datagrams())
            taken += len(part)
        assert identity.sequence == last.sequence
        assert list(batch.datagrams()) == rows_of
        assert len(batch) <= JOINED_ROWS
    assert left == []


def test_many_small_batches_are_few_messages() -> None:
    """Batches of one datagram that follow each other go as many together as may."""
    batches = [(Identity("ingest.1", 7, number, number), make_batch([b"%d" % number])) for number in range(600)]
    assert [len(batch) for _, batch in join(batches)] == [JOINED_ROWS, JOINED_ROWS, 600 - 2 * JOINED_ROWS]


def test_large_batches_are_messages_that_the_bus_takes() -> None:
    """Batches are joined up to a message's size, and one that was written whole from lent memory goes in parts."""
    worker = "ingest.1", 7
    some = [(Identity(*worker, number, 16 * number), make_batch([bytes(30_000)] * 16)) for number in range(4)]
    assert [len(batch) for _, batch in join(some)] == [16] * 4
    batch = make_batch([b"%d" % at * 300 for at in range(MAX_ROWS)])
    parts = [*cut(Identity(*worker, 1, 5000), batch)]
    assert len(parts) > 1
    assert all(len(part.payload) <= MAX_PAYLOAD for _, part in parts)
    totals = [5000 + sum(len(part) for _, part in parts[:at]) for at in range(len(parts))]
    assert [identity for identity, _ in parts] == [Identity(*worker, 1, total) for total in totals]
    assert [*chain.from_iterable(part.datagrams() for _, part in parts)] == [*batch.datagrams()]


def test_after_a_request_another_is_expected() -> None:
    """For a while after each request the journal expects the next one."""
    now = 100.0
    readers = Readers(lambda *_: True, {}, lambda: now)
    asked = [readers.asked_lately]
    readers.add(JournalRead(1, f"{REPLAY_PREFIX}forwarder.1.7/", "flows", 1, [], 1, 1), memory_short=False)
    for _ in range(2):
        now += LATELY_SECONDS / 2
        asked.append(readers.asked_lately)
    assert asked == [False, True, False]
