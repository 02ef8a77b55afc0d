"""A node by a clock of the test: when it leaves off serving, and when it serves again."""

from collections import Counter
from types import SimpleNamespace
from typing import cast
from unittest.mock import Mock

import pytest
from structlog.testing import capture_logs

from services.uplink.incoming.arrivals import Key
from services.uplink.nodes import node as module
from services.uplink.nodes.beats import Beat, Reached, State, beat_subject, unparse_beat
from services.uplink.nodes.cluster import SETTLE_SECONDS, Cluster
from services.uplink.nodes.membership import BEAT_SECONDS, SILENT_SECONDS
from services.uplink.nodes.node import HEAR_SECONDS, LOOK_SECONDS, PATIENCE_SECONDS, Node
from shared.bus.bodies.nodes_message import MOST_PENDING
from shared.bus.messages import Envelope, Status
from shared.client import Source
from shared.ledger.counters import NOT_AWAITED
from shared.nats.troubles import Troubles
from shared.serving_nodes import Minority
from shared.settings.uplink import Uplink

INGEST = Key("b", "ingest.1", 7, "flows")
NODES = ("a", "b", "c")


class World:
    """The node `a`, which lives, and a clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, minority: Minority) -> None:
        self.now = 100.0
        settings = Uplink(servers=("nats://127.0.0.1:4222",), site="a", nodes=NODES, minority=minority)
        publisher = Mock(sender="uplink.1", boot=1)
        self.pending = {"b": 0, "c": 0}
        self.account = Counter[str]()
        self.node = Node(settings, publisher, Mock(), self.account, lambda: self.pending)
        self.cluster = Cluster("a", NODES, minority, "uplink.1", 1, lambda: self.now, lambda: 33)
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(self.node, "_cluster", self.cluster)
        self.cluster.members.state = "live"
        self.node._connected_at = self.now
        self._number = 0

    def publish(self, start: int, stop: int) -> None:
        """Publish datagrams of `b` here."""
        self.node.note_crossed(INGEST, range(start, stop), range(start, stop))

    def pass_time(
        self,
        seconds: float,
        *heard: str,
        reached: int = 10,
        state: State = "live",
        votes: bool = False,
        missed: int = 0,
    ) -> str:
        """Let some time pass, while these nodes are heard, which have sent so much of `b`, or JetStream votes.

        `missed`: how often these have served without this node. Return the state of this node then.
        """
        until = self.now + seconds
        while self.now < until:
            self.now += LOOK_SECONDS
            self._number += 1
            status = Status("forwarder", 1, 1, self._number, 0, 1, {"forwarder": {"revision": 3}})
            self.node.note_status(Envelope(1, "status", "forwarder.1", 7, self._number, 0), status)
            for each in heard:
                places: dict[Source, list[Reached]] = {"relay": [Reached(*INGEST, reached)]}
                beat = Beat(each, 1, self._number, state, self._number, places, {"a": missed})
                self.cluster.take(beat_subject(each), unparse_beat(beat))
            if votes:
                self.cluster.members.note_vote()
            self.node.keep_up()
        return self.cluster.members.state


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    """A node that was live and is to hold, and does not hear the others any more."""
    world = World(monkeypatch, "hold")
    world.publish(0, 10)
    assert world.pass_time(5, "b", "c") == "live"
    assert world.pass_time(SILENT_SECONDS + LOOK_SECONDS) == "joining"
    assert world.pass_time(600) == "joining"
    return world


def test_a_node_that_held_serves_once_it_has_what_others_have_served(world: World) -> None:
    """A node that was cut off and served none catches up first, as after a start: or it would send all that again."""
    assert world.pass_time(10, "b", "c", reached=5000) == "joining"
    world.publish(4990, 5000)
    assert world.pass_time(LOOK_SECONDS, "b", "c", reached=5000) == "live"


def test_a_node_that_held_serves_at_once_if_nobody_else_does(world: World) -> None:
    """A node serves soon after it has the majority again, where no other node has served, or lives."""
    assert world.pass_time(HEAR_SECONDS - LOOK_SECONDS, "b", "c", state="joining") == "joining"
    assert world.pass_time(2 * LOOK_SECONDS, "b", "c", state="joining") == "live"
    assert world.pass_time(SILENT_SECONDS + LOOK_SECONDS) == "joining"
    assert world.pass_time(HEAR_SECONDS + LOOK_SECONDS, votes=True) == "live"


@pytest.fixture
def parted(monkeypatch: pytest.MonkeyPatch) -> World:
    """A node that serves on, and does not hear the others any more."""
    world = World(monkeypatch, "serve")
    world.publish(0, 10)
    assert world.pass_time(5, "b", "c") == "live"
    assert world.cluster.beat().state == "live"
    assert world.pass_time(60) == "live"
    return world


def test_a_node_that_was_replaced_serves_once_it_has_what_others_have_served(parted: World) -> None:
    """Others serve the collectors of a node that was parted until it has caught up: they miss nothing meanwhile.

    It never tells the others that it lives before: they would leave off, and begin anew at its old places.
    """
    assert parted.cluster.beat().state == "joining"
    for node in "bc":
        parted.cluster.take(beat_subject(node), unparse_beat(Beat(node, 1, parted._number, "live", 1, {}, {"a": 60})))
    assert parted.cluster.beat().state == "joining"
    assert parted.pass_time(10, "b", "c", reached=5000, missed=60) == "joining"
    assert parted.cluster.nodes("joining", {}).serving == ("b", "c")
    parted.publish(4990, 5000)
    assert parted.pass_time(LOOK_SECONDS, "b", "c", reached=5000, missed=60) == "live"
    assert parted.cluster.beat().state == "live"


def test_a_node_that_is_parted_again_before_it_has_caught_up_serves_on(parted: World) -> None:
    """All others may have died: it serves its collectors, as in the minority at any time."""
    assert parted.pass_time(10, "b", "c", reached=5000, missed=60) == "joining"
    assert parted.pass_time(SILENT_SECONDS - LOOK_SECONDS) == "joining"
    assert parted.cluster.nodes("joining", {}).serving == ("b", "c")
    assert parted.pass_time(2 * LOOK_SECONDS) == "live"
    assert parted.cluster.nodes("live", {}).serving == NODES
    assert parted.cluster.beat().state == "joining"
    assert parted.pass_time(10, "b", "c", reached=5000, missed=120) == "joining"
    assert parted.cluster.nodes("joining", {}).serving == ("b", "c")


def test_a_node_that_was_replaced_learns_so_after_jetstream_has_answered(parted: World) -> None:
    """JetStream may acknowledge before the first beat comes: this node is in the majority, and does not know yet."""
    assert parted.pass_time(LOOK_SECONDS, votes=True) == "live"
    assert parted.cluster.beat().state == "joining"
    assert parted.pass_time(LOOK_SECONDS, "b", "c", reached=5000, missed=60) == "joining"
    assert parted.pass_time(10, "b", "c", reached=5000, missed=120) == "joining"


def test_a_node_that_jetstream_alone_vouches_for_serves_on(parted: World) -> None:
    """No other node is heard that could have served without it."""
    assert parted.pass_time(SETTLE_SECONDS + LOOK_SECONDS, votes=True) == "live"
    assert parted.cluster.beat().state == "live"
    assert parted.cluster.nodes("live", {}).serving == ("a",)


def test_nodes_that_were_all_parted_serve_on(parted: World) -> None:
    """Each goes on with its own collectors where no node was in the majority: nobody else has served them."""
    assert parted.pass_time(LOOK_SECONDS, "b", "c", state="joining") == "live"
    assert parted.cluster.beat().state == "live"
    assert parted.cluster.nodes("live", {}).serving == NODES
    assert parted.pass_time(BEAT_SECONDS, "b", "c") == "live"
    assert parted.cluster.nodes("live", {}).serving == NODES
    assert parted.pass_time(SETTLE_SECONDS, "b", "c") == "live"
    assert parted.pass_time(SILENT_SECONDS + LOOK_SECONDS, "b") == "live"
    assert parted.cluster.nodes("live", {}).serving == ("a", "b")


def test_a_node_waits_for_messages_of_others_as_long_as_they_come(parted: World) -> None:
    """The stream of another node may have no leader for ever: then the node serves, and counts what waits of it."""
    parted.pending = {"b": 1000, "c": MOST_PENDING + 1}
    assert parted.pass_time(PATIENCE_SECONDS, "b", "c", missed=60) == "joining"
    parted.pending["b"], parted.pending["c"] = 900, 0
    assert parted.pass_time(PATIENCE_SECONDS - LOOK_SECONDS, "b", "c", missed=60) == "joining"
    assert parted.account[NOT_AWAITED] == 0
    with capture_logs() as logs:
        assert parted.pass_time(2 * LOOK_SECONDS, "b", "c", missed=60) == "live"
    told = [(each["event"], each["messages"]) for each in logs if each["log_level"] == "warning"]
    assert told == [("messages of other nodes do not become fewer: this node serves without them", {"b": 900})]
    assert parted.account[NOT_AWAITED] == 900


def test_two_nodes_of_one_name_are_told_of(parted: World) -> None:
    """Settings that were copied to another host make a second node of the name: both serve, and say so.

    The last beats of the uplink before this one are none of another one.
    """
    troubles, parted.cluster._began = Troubles(), parted.now

    def hear_namesake() -> None:
        beat = Beat("a", 99, 1, "live", 1, {})
        parted.cluster.take(beat_subject("a"), unparse_beat(beat))
        parted.node._tell_of_namesake(troubles)

    with capture_logs() as logs:
        hear_namesake()
        parted.pass_time(2 * SILENT_SECONDS, "b", "c")
        assert not troubles.now
        hear_namesake()
        assert [*troubles.now] == ["node"]
        parted.pass_time(SILENT_SECONDS, "b", "c")
        parted.node._tell_of_namesake(troubles)
    told = [each["event"] for each in logs if each.get("uplink") == "node"]
    assert [each.partition(":")[0] for each in told] == [
        "another uplink is node a",
        "no other uplink has the name of this node any more",
    ]


def test_senders_are_told_at_once_among_which_nodes_they_share_collectors(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node tells others whom it serves with: its senders know by then, though the same nodes live as before."""
    world = World(monkeypatch, "serve")
    for heard in ("b", "c"), ("c",), ():
        world.pass_time(5, *heard)
    publish, told = cast(Mock, world.node._publisher.publish), list[tuple[tuple[str, ...], tuple[str, ...]]]()
    for _ in range(20):
        world.pass_time(LOOK_SECONDS, "b", "c")
        nodes = publish.call_args.args[1]
        assert nodes.serving == world.cluster.beat().serving
        told.append((nodes.live, nodes.serving))
    assert list(dict.fromkeys(told)) == [(NODES, ("a", "c")), (NODES, NODES)]
