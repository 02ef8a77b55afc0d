"""Drops where the kernel's copies leave, by readings of links and queues."""

from services.offload.planning.egress_drops import EgressDrops
from shared.net.queues import Drops


def test_what_is_dropped_while_copies_leave_is_counted() -> None:
    """By link, from the first reading with copies to the last; a queue that was replaced begins at 0."""
    readings = [
        {2: Drops(100, 7), 3: Drops(5, 5)},
        {2: Drops(103, 7), 3: Drops(9, 9)},
        {2: Drops(2, 8), 3: Drops(10, 9)},
        {3: Drops(11, 9)},
        {2: Drops(50, 50), 3: Drops(11, 9)},
    ]
    drops = EgressDrops(lambda: readings.pop(0))
    drops.note({})
    assert drops.accounts() == {}
    drops.note({2: "up"})
    assert drops.accounts() == {}
    drops.note({2: "up", 3: "down"})
    assert drops.accounts() == {"egress/up": {"queue_drops": 3, "link_drops": 0}}
    drops.note({2: "up", 3: "down"})
    assert drops.accounts() == {
        "egress/up": {"queue_drops": 5, "link_drops": 1},
        "egress/down": {"queue_drops": 1, "link_drops": 0},
    }
    drops.note({3: "down"})
    drops.note({2: "up"})
    assert drops.accounts()["egress/up"] == {"queue_drops": 5, "link_drops": 1}
    assert readings == []


def test_nothing_is_read_while_no_copies_leave() -> None:
    """But once more after the last copies, which a queue may drop later; and where other links are in use."""
    readings = [Drops(1, 0), Drops(2, 0), Drops(3, 0), Drops(9, 0)]
    drops = EgressDrops(lambda: {2: readings.pop(0), 3: Drops(0, 0)})
    for copied, left in ((True, 3), (False, 2), (False, 2), (False, 2), (True, 1)):
        drops.note({2: "up"}, copied=copied)
        assert len(readings) == left
    assert drops.accounts()["egress/up"]["queue_drops"] == 2
    drops.note({2: "up"}, copied=False)
    drops.note({2: "up"}, copied=False)
    assert readings == []
    readings.append(Drops(9, 0))
    drops.note({2: "up", 3: "down"}, copied=False)
    assert readings == []
