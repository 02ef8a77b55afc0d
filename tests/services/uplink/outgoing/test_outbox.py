from collections import Counter

import pytest

from services.uplink.outgoing.outbox import LONGEST_PAUSE_SECONDS, Outbox
from services.uplink.packs import Pack
from services.uplink.subjects import Origin, unparse_subject
from shared.ledger.counters import ACKNOWLEDGED, HELD, SERVER_AWAY, SERVER_REFUSED, SERVER_SLOW, STOPPED
from shared.ledger.equations import discrepancies

ORIGIN = Origin("berlin", "flows", "ingest.1")


class Clock:
    """A clock that a test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    """A clock at zero."""
    return Clock()


def outbox(clock: Clock, most: int = 1000) -> Outbox:
    """An outbox with a connection."""
    made = Outbox(most, 4, lambda _: Counter(), clock)
    made.connect()
    return made


def offer(box: Outbox, *numbers: int, size: int = 100, origin: Origin = ORIGIN) -> list[str]:
    """Put messages of two datagrams; return the causes of what was dropped."""
    found = []
    for number in numbers:
        box.take(origin.stream, 2)
        found.append(box.put(Pack(origin, 1, number, number, 2, bytes(size), number + 2)))
    return found


def sent(box: Outbox) -> list[int]:
    """Send what may be sent; return the numbers."""
    found = []
    while pack := box.next():
        found.append(pack.start)
    return found


def number(first: int) -> str:
    """The number of a message that `offer` has made."""
    return f"1/ingest.1/flows/{first}-{first + 2}"


def balanced(box: Outbox) -> bool:
    """Return whether the accounts add up."""
    return not list(discrepancies({f"sending/{name}": account for name, account in box.accounts.items()}))


def test_the_number_under_way_grows_with_acknowledgements(clock: Clock) -> None:
    """One message goes first, then more, up to `in_flight`; each acknowledgement makes room for another."""
    box = outbox(clock)
    offer(box, *range(9))
    assert sent(box) == [0]
    box.acknowledge(number(0))
    assert sent(box) == [1, 2]
    box.acknowledge(number(2))
    box.acknowledge(number(1))
    assert sent(box) == [3, 4, 5, 6]
    box.acknowledge(number(3))
    box.acknowledge(number(3))
    assert sent(box) == [7]
    assert box.accounts["flows"][ACKNOWLEDGED] == 8
    assert box.accounts["flows"][HELD] == 10
    assert balanced(box)


def test_after_a_failure_all_goes_again_in_order(clock: Clock) -> None:
    """All that was under way goes again, the oldest first and alone, after a pause that grows with each failure."""
    box = outbox(clock)
    offer(box, *range(5))
    sent(box)
    box.acknowledge(number(0))
    assert sent(box) == [1, 2]
    pauses = []
    for _ in range(9):
        assert box.fail()
        assert not box.fail()  # nothing is under way any more
        assert sent(box) == []
        pauses.append(box.pause_left())
        clock.now += pauses[-1]
        assert sent(box) == [1]
    assert pauses == sorted(pauses)
    assert pauses[-1] == LONGEST_PAUSE_SECONDS
    box.acknowledge(number(2))  # late: its first attempt had got there
    box.acknowledge(number(1))
    assert sent(box) == [3, 4]
    assert balanced(box)


def test_a_new_connection_begins_with_what_is_not_acknowledged(clock: Clock) -> None:
    """After the end of a connection nothing is sent; with the next one it begins anew, in order."""
    box = outbox(clock)
    offer(box, 0, 1, 2)
    sent(box)
    box.disconnect()
    assert sent(box) == []
    box.connect()
    assert sent(box) == [0]


def test_what_finds_no_room_is_dropped_under_its_cause(clock: Clock) -> None:
    """Without room the newest is dropped: as `server_away` without a connection, else as `server_slow`."""
    box = outbox(clock, most=250)
    assert offer(box, 0, 1, 2) == ["", "", SERVER_SLOW]
    box.disconnect()
    assert offer(box, 3) == [SERVER_AWAY]
    assert box.accounts["flows"] == {"taken": 8, HELD: 4, SERVER_SLOW: 2, SERVER_AWAY: 2}
    box.drop_all(STOPPED, ())
    assert box.empty
    assert box.accounts["flows"][STOPPED] == 4
    assert balanced(box)


def test_a_refused_subject_is_dropped_alone(clock: Clock) -> None:
    """Messages of a subject that the server refuses go, those under way too; others stay."""
    box = outbox(clock)
    offer(box, 0, 1)
    offer(box, 2, origin=ORIGIN._replace(stream="Syslog"))
    assert sent(box) == [0]
    assert box.drop_subject(unparse_subject(ORIGIN).lower(), SERVER_REFUSED) == 2
    assert sent(box) == [2]
    assert box.accounts["flows"] == {"taken": 4, HELD: 0, SERVER_REFUSED: 4}
    assert box.drop_subject("fanwire.berlin.syslog.ingest-1", SERVER_REFUSED) == 1
    assert balanced(box)


def test_overdue_is_what_went_too_long_ago(clock: Clock) -> None:
    """A message is overdue once it is under way for longer than that; one that waits is not."""
    box = outbox(clock)
    offer(box, 0)
    clock.now = 9.0
    assert not box.overdue(4.0)
    sent(box)
    clock.now = 13.5
    assert box.overdue(4.0)
    box.acknowledge(number(0))
    assert not box.overdue(4.0)
