import random
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.uplink.incoming import arrivals as module
from services.uplink.incoming.arrivals import HOLD_SECONDS, MAX_ORIGINS, Arrivals, Key, keys_of
from services.uplink.packs import UNKNOWN, Arrived
from services.uplink.subjects import Origin
from shared.bus.continuity import MAX_GAP
from shared.bus.messages import Datagrams, Message, datagrams_topic
from shared.ledger.equations import discrepancies
from tests.builders import make_batch, make_envelope

ORIGIN = Origin("bonn", "messages", "ingest.1")
KEY = Key("bonn", "ingest.1", 7, "messages")


class Clock:
    """A clock that a test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def arrived(after: int, *counts: tuple[int, int], size: int = 100, site: str = "bonn") -> Arrived:
    """A message with batches: the count before each, and its datagrams."""
    batches = []
    for sequence, (total, count) in enumerate(counts):
        envelope = make_envelope(sender="ingest.1", kind="datagrams", boot=7, sequence=sequence, total=total)
        batch = make_batch([b"x"] * count)
        batches.append(Message(datagrams_topic("messages"), envelope, Datagrams("messages", 0), batch))
    return Arrived(ORIGIN._replace(site=site), 7, after, batches, size)


def handle(found: Arrivals, ready: list[Arrived]) -> Iterator[range]:
    """Handle messages as the service does; yield the datagrams that it would publish."""
    while ready:
        each = ready.pop(0)
        for key, total, count in keys_of(each):
            had = found.had(key, total, count)
            if had < count:
                yield range(total + had, total + count)
            found.note(key, total, count)
        ready[:0] = found.follow(each)


def flat(ranges: Iterator[range]) -> list[int]:
    """The datagrams, one by one."""
    return [number for each in ranges for number in each]


def balanced(found: Arrivals) -> bool:
    """Return whether the accounts add up."""
    return not list(discrepancies(found.accounts()))


@given(st.lists(st.integers(1, 5), min_size=1, max_size=12), st.randoms(use_true_random=False))
def test_in_order_and_once(sizes: list[int], draw: random.Random) -> None:
    """Each datagram comes once and in order, however messages are repeated, and exchanged while under way."""
    packs: list[Arrived] = []
    found, total = Arrivals(Clock()), 0
    for size in sizes:
        packs.append(arrived(total if packs else UNKNOWN, (total, size)))
        total += size
    first, rest = packs[0], packs[1:]
    rest = [each for each in rest for _ in range(draw.randint(1, 3))]
    draw.shuffle(rest)
    came = flat(handle(found, found.order(first)))
    for each in rest:
        came += flat(handle(found, found.order(each)))
    assert came == list(range(total))
    assert not found.holding
    assert balanced(found)
    account = found.positions[KEY].account()
    assert (account["taken"], account["missed"]) == (total, 0)
    assert account["repeated"] == sum(len(each.batches[0].batch or ()) for each in rest) - sum(sizes[1:])


def test_a_gap_that_the_sender_knows_of_is_missed_at_once() -> None:
    """A gap before a message that says it is the next one is a loss: nothing waits for that."""
    found = Arrivals(Clock())
    assert flat(handle(found, found.order(arrived(UNKNOWN, (100, 10))))) == list(range(100, 110))
    assert flat(handle(found, found.order(arrived(110, (115, 5), (130, 1))))) == [*range(115, 120), 130]
    assert found.positions[KEY].account() == {
        "baseline": 100, "taken": 16, "missed": 15, "reached": 131, "repeated": 0
    }  # fmt: skip
    assert balanced(found)


def test_an_earlier_message_is_waited_for_and_then_missed() -> None:
    """A message behind one that has not come waits; after a while it goes on, and what lies between is missed."""
    clock = Clock()
    found = Arrivals(clock)
    flat(handle(found, found.order(arrived(UNKNOWN, (0, 10)))))
    assert found.order(arrived(20, (20, 5))) == []
    assert found.order(arrived(25, (25, 5))) == []
    assert found.overdue("bonn") == []
    clock.now = HOLD_SECONDS
    assert flat(handle(found, found.overdue("bonn"))) == list(range(20, 30))
    assert not found.holding
    assert flat(handle(found, found.order(arrived(10, (10, 10))))) == []  # too late: it would be out of order
    assert found.positions[KEY].account()["missed"] == 10
    assert balanced(found)


def test_little_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """With more than may wait nothing is waited for any more."""
    monkeypatch.setattr(module, "MAX_HELD", 250)
    found = Arrivals(Clock())
    flat(handle(found, found.order(arrived(UNKNOWN, (0, 10)))))
    assert found.order(arrived(20, (20, 5))) == []
    assert found.order(arrived(25, (25, 5))) == []
    assert flat(handle(found, found.order(arrived(30, (30, 5))))) == list(range(20, 35))


def test_a_site_that_takes_all_the_room_leaves_others_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    """While one site takes all the room, messages of another one still wait for earlier ones, and that one's go on."""
    monkeypatch.setattr(module, "MAX_HELD", 400)
    clock = Clock()
    clock.now = 1.0
    found = Arrivals(clock)
    for site in ("bonn", "cologne"):
        flat(handle(found, found.order(arrived(UNKNOWN, (0, 10), site=site))))
    for after in (20, 25, 30, 35):
        assert found.order(arrived(after, (after, 5))) == []
    assert found.order(arrived(20, (20, 5), site="cologne")) == []
    assert found.order(arrived(25, (25, 5), site="cologne")) == []
    assert flat(handle(found, found.overdue("bonn"))) == list(range(20, 40))
    assert found.overdue("cologne") == []
    assert flat(handle(found, found.order(arrived(10, (10, 10), site="cologne")))) == list(range(10, 30))
    assert not found.holding
    assert balanced(found)


def test_a_batch_that_was_had_in_part_is_taken_in_part() -> None:
    """Of a batch that overlaps what was reached, only the rest is taken."""
    found = Arrivals(Clock())
    flat(handle(found, found.order(arrived(UNKNOWN, (0, 10)))))
    assert flat(handle(found, found.order(arrived(UNKNOWN, (6, 10))))) == list(range(10, 16))
    assert found.positions[KEY].account()["repeated"] == 4
    assert balanced(found)


def test_the_next_process_goes_on() -> None:
    """A process begins where the last one has stopped, also where that was killed between two stores."""
    found = Arrivals(Clock())
    flat(handle(found, found.order(arrived(UNKNOWN, (5, 10)))))
    tables = found.accounts()
    tables["arriving/bonn/ingest.1/7/messages"]["reached"] += 3
    again = Arrivals(Clock())
    again.restore(tables)
    assert balanced(again)
    assert flat(handle(again, again.order(arrived(15, (15, 5))))) == [18, 19]


def test_the_table_is_bounded() -> None:
    """Origins without end take no memory without end; a count that jumps is followed anew, not counted as a loss."""
    found = Arrivals(Clock())
    for boot in range(MAX_ORIGINS + 5):
        found.note(KEY._replace(boot=boot), 0, 1)
    assert len(found.positions) == MAX_ORIGINS
    last = KEY._replace(boot=MAX_ORIGINS + 4)
    found.note(last, MAX_GAP + 7, 1)
    assert found.positions[last].missed == 0
    assert balanced(found)


def test_a_site_with_many_origins_takes_room_of_its_own_alone() -> None:
    """A site whose workers start again and again costs no other site its place, however quiet that one is."""
    found = Arrivals(Clock())
    quiet = KEY._replace(site="quiet")
    found.note(quiet, 0, 5)
    for boot in range(2 * MAX_ORIGINS):
        found.note(KEY._replace(boot=boot), 0, 1)
    assert len(found.positions) == MAX_ORIGINS
    assert found.had(quiet, 0, 5) == 5
