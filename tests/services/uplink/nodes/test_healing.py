"""Links that break and heal, and nodes that are killed, by a clock of the test: nothing is lost unsaid."""

from random import Random
from typing import Final

import pytest

from shared.serving_nodes import Minority
from tests.services.uplink.nodes.played_nodes import CLIENTS, LINKS, NODES, World

BOTH: Final = pytest.mark.parametrize("minority", ["serve", "hold"])
SETTLED_SECONDS: Final = 40.0


def settle(world: World) -> None:
    """Let what is broken work again, and check that each datagram was sent to each collector by a node, or counted.

    What two of them send is counted, too: by the one that takes over, or by the one that others have missed. Of one
    that was killed since, the others need not know.
    """
    for link in sorted(world.broken):
        world.heal(link, 0)
    for name in NODES:
        world.start(name)
    world.pass_time(SETTLED_SECONDS)
    assert world.delivered.keys() == CLIENTS.keys()
    assert {name: some[:3] for name, some in world.lost.items()} == {}
    assert {name: some[:3] for name, some in world.uncounted(world.nodes.values()).items()} == {}


@BOTH
@pytest.mark.parametrize(
    ("broken", "seconds", "healed"),
    [
        (("bc", "ab"), 15, [("bc", 0, 20), ("ab", 3, 1)]),
        (("ab", "bc", "ac"), 3, [("ab", 0, 10), ("ac", 3, 6), ("bc", 0, 6)]),
        (("ab", "bc", "ac"), 15, [("ab", 1, 10), ("ac", 3, 6), ("bc", 0, 6)]),
        (("ab", "bc", "ac"), 15, [("bc", 1, 0), ("ab", 0, 2), ("ac", 0, 6)]),
        (("ab", "bc", "ac"), 3, [("bc", 0, 0), ("ab", 0, 20), ("ac", 5, 20)]),
    ],
)
def test_nothing_is_lost_in_silence_where_links_heal_one_after_the_other(
    minority: Minority,
    broken: tuple[str, ...],
    seconds: float,
    healed: list[tuple[str, float, float]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Links break together, and heal one after the other: all is sent or counted, once or as perhaps twice."""
    world = World(monkeypatch, minority)
    world.pass_time(8)
    world.broken.update(broken)
    world.pass_time(seconds)
    for link, later, pause in healed:
        world.heal(link, later)
        world.pass_time(pause)
    settle(world)


@BOTH
def test_nothing_is_lost_in_silence_where_links_break_one_after_the_other(
    minority: Minority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node dies that has lacked for long what its successor has had: that is counted, beyond what the ring has."""
    world = World(monkeypatch, minority)
    world.pass_time(8)
    for link, heals_after, seconds in (("bc", None, 6), ("bc", 1, 1), ("ab", None, 20), ("ac", None, 10)):
        if heals_after is None:
            world.broken.add(link)
        else:
            world.heal(link, heals_after)
        world.pass_time(seconds)
    for link, later, seconds in (("ab", 3, 6), ("ac", 1, 1)):
        world.heal(link, later)
        world.pass_time(seconds)
    settle(world)


def test_what_a_node_took_in_that_is_killed_again_before_it_serves_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node is parted, killed, started, and killed before it serves: its last start counts what no node had of it."""
    world = World(monkeypatch, "hold")
    world.pass_time(8)
    for pause in (12, 4):
        world.kill("a")
        world.pass_time(pause)
        world.start("a")
        world.pass_time(pause)
    settle(world)


def test_what_a_node_has_sent_that_was_killed_while_others_missed_it_is_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two nodes miss each other, and one is killed before they hear each other again: its next start tells of it."""
    world = World(monkeypatch, "serve")
    world.pass_time(8)
    world.broken.add("ab")
    world.pass_time(17)
    world.kill("a")
    world.pass_time(3)
    settle(world)
    assert world.uncounted(world.relays) == {}


def test_what_a_node_has_lacked_that_was_killed_while_it_was_parted_is_brought(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A node that is parted is killed, and serves again before it is heard: its successor brings what it lacks."""
    world = World(monkeypatch, "serve")
    world.pass_time(8)
    world.kill("a")
    world.pass_time(10)
    world.broken.add("bc")
    world.kill("b")
    world.pass_time(1)
    world.start("b")
    world.pass_time(6)
    world.heal("bc", 3)
    world.pass_time(6)
    settle(world)


def test_what_comes_of_other_nodes_before_the_first_one_joins_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """All nodes have died, and one is not heard: the first to join counts what its ring has no more of another one."""
    world = World(monkeypatch, "hold")
    world.pass_time(8)
    world.broken.update(("ab", "ac"))
    for name in NODES:
        world.kill(name)
    world.pass_time(2)
    for name in ("a", "c", "b"):
        world.start(name)
        world.pass_time(3)
    world.pass_time(30)
    settle(world)


def play(world: World, random: Random, *, kills: bool) -> None:
    """Break and heal links, kill and start nodes, with pauses between."""
    world.pass_time(8)
    for _ in range(random.randint(3, 9)):
        what = random.choice([*LINKS, *(NODES if kills else ())])
        if what in NODES:
            (world.kill if what in world.nodes else world.start)(what)
        elif what in world.broken:
            world.heal(what, random.choice([0, 1, 3, 6]))
        else:
            world.broken.add(what)
        world.pass_time(random.choice([0, 1, 1, 2, 3, 6, 10, 15, 20, 30]))


@BOTH
@pytest.mark.parametrize("kills", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_nothing_is_lost_in_silence_whatever_fails(
    seed: int, kills: bool, minority: Minority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Links and nodes fail in any order, and overlap: all is sent or counted, once or as perhaps twice."""
    world = World(monkeypatch, minority)
    play(world, Random(seed), kills=kills)
    settle(world)
