"""A node by a clock of the test: when it leaves off serving, and when it serves again."""

from collections import Counter
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from services.uplink.incoming.arrivals import Key
from services.uplink.nodes import node as module
from services.uplink.nodes.beats import Beat, Reached, State, beat_subject, unparse_beat
from services.uplink.nodes.cluster import Cluster
from services.uplink.nodes.membership import SILENT_SECONDS
from services.uplink.nodes.node import HEAR_SECONDS, LOOK_SECONDS, Node
from shared.bus.messages import Envelope, Status
from shared.settings.uplink import Uplink

INGEST = Key("b", "ingest.1", 7, "flows")
SETTINGS = Uplink(servers=("nats://127.0.0.1:4222",), site="a", nodes=("a", "b", "c"), minority="hold")


class World:
    """The node `a`, which lives and is to hold, and a clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        publisher = Mock(sender="uplink.1", boot=1)
        self.node = Node(SETTINGS, publisher, Mock(), Counter(), lambda: {"b": 0, "c": 0})
        self.cluster = Cluster("a", SETTINGS.nodes, "hold", "uplink.1", 1, lambda: self.now, lambda: 33)
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(self.node, "_cluster", self.cluster)
        self.cluster.members.state = "live"
        self.node._connected_at = self.now
        self._number = 0

    def publish(self, start: int, stop: int) -> None:
        """Publish datagrams of `b` here."""
        self.node.note_crossed(INGEST, range(start, stop), range(start, stop))

    def pass_time(
        self, seconds: float, *heard: str, reached: int = 10, state: State = "live", votes: bool = False
    ) -> str:
        """Let some time pass, while these nodes are heard, which have sent so much of `b`, or JetStream votes.

        Return the state of this node then.
        """
        until = self.now + seconds
        while self.now < until:
            self.now += LOOK_SECONDS
            self._number += 1
            status = Status("forwarder", 1, 1, self._number, 0, 1, {"forwarder": {"revision": 3}})
            self.node.note_status(Envelope(1, "status", "forwarder.1", 7, self._number, 0), status)
            for each in heard:
                beat = Beat(each, 1, self._number, state, self._number, {"relay": [Reached(*INGEST, reached)]})
                self.cluster.take(beat_subject(each), unparse_beat(beat))
            if votes:
                self.cluster.members.note_vote()
            self.node.keep_up()
        return self.cluster.members.state


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    """A node that was live, and does not hear the others any more."""
    world = World(monkeypatch)
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
