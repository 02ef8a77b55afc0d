"""A node whose beats are late, though it lives, by a clock of the test: what it counts as sent twice."""

from collections import Counter
from typing import Final

import pytest

from services.uplink.nodes.beats import beat_subject, unparse_beat
from services.uplink.nodes.cluster import TOLD_NS, Cluster
from services.uplink.nodes.membership import BEAT_SECONDS, SILENT_SECONDS
from shared.bus.bodies.nodes_message import Node
from shared.fanout.sending.perhaps_twice import LOOK_SECONDS, LOOKS, PerhapsTwice
from shared.ledger.counters import PERHAPS_TWICE, SENT

COPIES: Final = 10
"""Those that each node sends to a collector of its own between two looks."""


class World:
    """Three nodes, and the account of a collector of `a`."""

    def __init__(self) -> None:
        self.now = 100.0
        self.clusters = {
            name: Cluster(name, ("a", "b", "c"), "serve", "uplink.1", 1, lambda: self.now, lambda: int(self.now * 1e9))
            for name in "abc"
        }
        for cluster in self.clusters.values():
            cluster.members.state = "live"
            cluster.nodes("live", {})  # nobody is heard yet: each goes on as if all lived
        self.account: Counter[str] = Counter()
        self._perhaps_twice = PerhapsTwice(lambda: self.now)

    def pass_time(self, seconds: float, *, heard: str = "abc", hears: bool = True) -> None:
        """Let time pass, while only the `heard` nodes are heard, and `a` `hears` them or not."""
        until = self.now + seconds
        while self.now < until:
            self.now += BEAT_SECONDS
            self.account[SENT] += COPIES
            beats = [each.beat() for each in self.clusters.values()]
            for name, cluster in self.clusters.items():
                for beat in beats:
                    if beat.node in heard and (name != "a" or hears):
                        cluster.take(beat_subject(beat.node), unparse_beat(beat))
                if name != "a":
                    cluster.nodes("live", {})
            self._perhaps_twice.note(self.clusters["a"].nodes("live", {}).nodes, {"siem": self.account})

    @property
    def counted(self) -> int:
        """The copies that `a` has counted as perhaps sent twice."""
        return self.account[PERHAPS_TWICE]


@pytest.mark.parametrize("hears", [True, False])
@pytest.mark.parametrize("late", [SILENT_SECONDS + BEAT_SECONDS, 4.0, 60.0])
def test_a_node_that_was_missed_counts_what_it_sent_meanwhile(late: float, hears: bool) -> None:
    """Others took over: all that this node sent since is counted, and that of a few seconds before, not for ever."""
    world = World()
    world.pass_time(30)
    sent = COPIES * int(late / BEAT_SECONDS)
    told = COPIES * int(TOLD_NS / 1e9 / BEAT_SECONDS)  # the one that takes over has counted these
    for _ in range(2):
        before = world.counted
        world.pass_time(late, heard="bc", hears=hears)
        world.pass_time(4)
        counted = world.counted - before
        assert sent - told <= counted <= sent + COPIES * (LOOKS * LOOK_SECONDS + 3) / BEAT_SECONDS
        world.pass_time(30)
        assert world.counted == before + counted


def test_a_node_that_two_others_missed_one_within_the_other_counts_all_of_both() -> None:
    """A node counts what it sent while another one missed it once it hears that again, though it heard a third before.

    Nothing is counted twice.
    """
    perhaps_twice, account, now = PerhapsTwice(lambda: now), Counter[str](), 0.0

    def pass_time(seconds: int, b: tuple[int, int], c: tuple[int, int]) -> None:
        nonlocal now
        for _ in range(seconds):
            now += 1
            account[SENT] += COPIES
            nodes = [
                Node(name, "silent" if silent else "live", 9000 * silent, missed=missed)
                for name, (silent, missed) in (("b", b), ("c", c))
            ]
            perhaps_twice.note([Node("a", "live"), *nodes], {"siem": account})

    heard, unheard = (0, 0), (1, 0)
    pass_time(10, heard, heard)
    pass_time(60, unheard, heard)
    pass_time(60, unheard, unheard)
    pass_time(10, unheard, (0, 1))
    assert COPIES * 60 <= account[PERHAPS_TWICE] <= COPIES * (60 + LOOKS + 1)
    pass_time(10, (0, 1), (0, 1))
    assert COPIES * 130 <= account[PERHAPS_TWICE] <= COPIES * (130 + LOOKS + 1)
    pass_time(60, (0, 1), (0, 1))
    assert account[PERHAPS_TWICE] <= COPIES * (130 + LOOKS + 1)


def test_a_node_that_comes_counts_what_it_sends_until_others_leave_off() -> None:
    """A node that is live serves its collectors before the others know: also that is counted, and no more."""
    world = World()
    world.clusters["a"].members.state = "joining"
    world.pass_time(30)
    world.account = Counter()
    world.clusters["a"].members.state = "live"
    world.pass_time(2, heard="bc")
    until_heard = world.account[SENT]
    world.pass_time(4)
    counted = world.counted
    world.pass_time(30)
    assert until_heard <= world.counted == counted < COPIES * 6 / BEAT_SECONDS


@pytest.mark.parametrize("late", [SILENT_SECONDS - BEAT_SECONDS, 0.0])
def test_a_node_that_nobody_missed_counts_nothing(late: float) -> None:
    """Beats that come in time, also one that is a little late, and a node that has died or begins, cost no account."""
    world = World()
    world.pass_time(30)
    world.pass_time(late, heard="bc")
    world.pass_time(10)
    world.pass_time(30, heard="ab")
    world.pass_time(10)
    world.clusters["c"] = Cluster("c", ("a", "b", "c"), "serve", "uplink.1", 2, lambda: world.now)
    world.pass_time(10)
    assert world.counted == 0
