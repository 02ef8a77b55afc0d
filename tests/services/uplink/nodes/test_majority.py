"""Nodes of which half or more are not heard, by a clock of the test: who serves, and where collectors go on."""

import pytest

from services.uplink.nodes.beats import Beat, Reached, beat_subject, unparse_beat
from services.uplink.nodes.cluster import Cluster
from services.uplink.nodes.membership import BEAT_SECONDS, SILENT_SECONDS
from services.uplink.nodes.node import LOOK_SECONDS
from shared.client import Place
from shared.serving_nodes import Minority, Owners
from tests.builders import make_client

PLACE = Place("messages", "ingest.1", 7, 0, 500)
CLIENTS = {name: make_client(name, streams=("messages",)) for name in map(str, range(20))}


class Clock:
    """A clock that a test sets."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


class Node:
    """The node `a`, and the owners of collectors as its senders of copies know them."""

    def __init__(self, nodes: str, minority: Minority) -> None:
        self.clock = Clock()
        self.cluster = Cluster("a", tuple(nodes), minority, "uplink.1", 1, self.clock, lambda: 33)
        self.cluster.members.state = "live"
        self.owners = Owners("a", tuple(nodes), minority, self.clock)
        self._nodes = tuple(nodes)
        self._number = 0

    def hear(self, *nodes: str) -> None:
        """Hear these nodes."""
        self._number += 1
        for node in nodes:
            reached = [Reached("a", PLACE.worker, PLACE.boot, PLACE.stream, PLACE.total)]
            beat = Beat(node, 1, self._number, "live", self._number, {"relay": reached}, {}, self._nodes)
            self.cluster.take(beat_subject(node), unparse_beat(beat))

    def split(self) -> dict[str, Place | None]:
        """Tell the senders of the nodes; return the collectors that they serve, and where these resume."""
        self.owners.note(self.cluster.nodes("live", {}))
        own, _ = self.owners.split(CLIENTS, "relay")
        return {name: client.resume.places[0] if client.resume else None for name, client in own.items()}


@pytest.mark.parametrize("minority", ["serve", "hold"])
def test_the_last_of_two_nodes_serves_on(minority: Minority) -> None:
    """One of two nodes dies: by JetStream the other one knows in time that it may serve, and all resume in place."""
    node = Node("ab", minority)
    node.hear("b")
    own = node.split()
    assert 0 < len(own) < len(CLIENTS)
    died = node.clock.now
    while node.clock.now < died + 2 * SILENT_SECONDS:
        node.clock.now += LOOK_SECONDS
        served = node.split()
        assert served.keys() >= own.keys()
        assert all(served[name] is None for name in own)
        if node.cluster.members.in_doubt and (node.clock.now - died) % BEAT_SECONDS == 0:
            node.cluster.members.note_vote()
    assert {served[name] for name in CLIENTS.keys() - own} == {PLACE}
