"""Links between three nodes that break and heal one after the other, by a clock of the test: nothing is lost unsaid.

Datagrams, rings and JetStream are played; what nodes tell each other, and where collectors go on, is the real thing.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Final
from unittest.mock import Mock

import pytest

import shared.serving_nodes
from services.uplink.incoming.arrivals import Key
from services.uplink.nodes import node as module
from services.uplink.nodes.beats import beat_subject, unparse_beat
from services.uplink.nodes.cluster import Cluster
from services.uplink.nodes.membership import BEAT_SECONDS
from services.uplink.nodes.node import LOOK_SECONDS, Node
from shared.bus.bodies.nodes_message import MOST_PENDING, Nodes
from shared.bus.continuity import Worker
from shared.bus.messages import Envelope, Status
from shared.client import Resume
from shared.fanout.catch_up.rings import RING_SECONDS
from shared.fanout.sending.perhaps_twice import PerhapsTwice
from shared.ledger.accounts import unparse_origin
from shared.ledger.counters import PERHAPS_TWICE, SENT
from shared.serving_nodes import Minority, Owners
from shared.settings.uplink import Uplink
from tests.builders import make_client

NODES: Final = ("a", "b", "c")
STEP: Final = LOOK_SECONDS / 2
"""Seconds between two datagrams of a node."""
BEGAN: Final = 100.0
CLIENTS: Final = {name: make_client(name, streams=("flows",)) for name in map(str, range(12))}
Datagram = tuple[str, int]
"""Its origin, and its number there."""


class Relay:
    """A node: its part in the cluster, and a forwarder that is played to."""

    def __init__(self, name: str, world: "World", minority: Minority) -> None:
        self.name, self._world = name, world
        settings = Uplink(servers=("nats://127.0.0.1:4222",), site=name, nodes=NODES, minority=minority)
        publisher = Mock(sender="uplink.1", boot=ord(name), publish=self._take_nodes)
        self.pending = {other: 0 for other in NODES if other != name}
        self.node = Node(settings, publisher, Mock(), Counter(), lambda: self.pending)
        clock, time_ns = (lambda: world.now), (lambda: world.now_ns)
        self.cluster = self.node._cluster = Cluster(name, NODES, minority, "uplink.1", ord(name), clock, time_ns)
        self.node._connected_at, self._began_ns = world.now, world.now_ns
        self._owners = Owners(name, NODES, minority, clock)
        self._own: dict[str, Resume | None] = {}
        self.accounts: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.once: defaultdict[str, list[Datagram]] = defaultdict(list)
        """By collector: what was sent to it, and not counted as perhaps sent twice."""
        self._perhaps_twice = PerhapsTwice(clock, time_ns)
        self.counts = Counter[Worker]()
        self._left_off: dict[str, Counter[Worker]] = {}
        self._ring: list[tuple[float, Worker, int, Datagram]] = []
        self._reports = 0

    def _take_nodes(self, _: str, told: Nodes) -> bool:
        before = {name: account[PERHAPS_TWICE] for name, account in self.accounts.items()}
        self._perhaps_twice.note(told.nodes, {name: self.accounts[name] for name in self._own})
        for name, counted in before.items():
            del self.once[name][len(self.once[name]) - (self.accounts[name][PERHAPS_TWICE] - counted) :]
        if self._owners.note(told) or not self._owners.settled or not self._owners._owners:
            clients, _others = self._owners.split(CLIENTS, "relay")
            self._left_off |= {name: Counter(self.counts) for name in self._own.keys() - clients.keys()}
            fresh = clients.keys() - self._own.keys()
            self._own = {name: client.resume for name, client in clients.items()}
            for name in fresh:
                self._resume(name, clients[name].resume)
        return True

    def _resume(self, name: str, resume: Resume | None) -> None:
        """Send a collector what it is owed, as far as the ring has it."""
        if resume is None:
            return
        told = {(place.worker, place.boot): place.total for place in resume.places}
        places = self._left_off.get(name, {}) if resume.generation else told
        for at, worker, count, datagram in self._ring:
            if count >= places.get(worker, 0) and (worker in places or at >= self._world.now - RING_SECONDS):
                self._send(name, datagram)  # or it is counted, as it is no more in the ring

    def _send(self, name: str, datagram: Datagram) -> None:
        """Send a copy to a collector; it is counted as perhaps sent twice if another node may have sent it before."""
        self._world.outcomes[name][datagram] += 1
        self.accounts[name][SENT] += 1
        resume = self._own[name]
        if resume and self._world.received_ns(datagram) < resume.twice_until_ns:
            self.accounts[name][PERHAPS_TWICE] += 1
        else:
            self.once[name].append(datagram)

    def arrive(self, worker: str, datagram: Datagram) -> None:
        """Let a datagram come by the bus."""
        key = worker, ord(self.name)
        self._ring.append((self._world.now, key, self.counts[key], datagram))
        self.counts[key] += 1
        for name in self._own:
            self._send(name, datagram)

    def fetch(self, origin: str, numbers: range) -> None:
        """Let datagrams of another node come by the uplink."""
        here = self.counts["uplink.1", ord(self.name)]
        self.node.note_crossed(Key(origin, "ingest.1", ord(origin), "flows"), numbers, range(here, here + len(numbers)))
        for number in numbers:
            self.arrive("uplink.1", (origin, number))

    def report(self) -> None:
        """Let the forwarder report."""
        self._reports += 1
        accounts = {
            unparse_origin(*worker, "flows"): {"reached": count, "baseline": 0} for worker, count in self.counts.items()
        }
        status = Status("forwarder", 1, self._began_ns, self._reports, 0, 1, {"forwarder": {"revision": 1}, **accounts})
        self.node.note_status(Envelope(1, "status", "forwarder.1", 7, self._reports, 0), status)


class World:
    """Three nodes, and the links that are broken; of one that heals, datagrams come some seconds after beats."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, minority: Minority) -> None:
        self.now = BEGAN
        clock = SimpleNamespace(monotonic=lambda: self.now, time_ns=lambda: self.now_ns)
        monkeypatch.setattr(module, "time", clock)
        monkeypatch.setattr(shared.serving_nodes, "time", clock)
        self.outcomes: defaultdict[str, Counter[Datagram]] = defaultdict(Counter)
        """By collector: how often each datagram was sent to it, or counted."""
        self.broken: set[str] = set()
        self._flows_at: dict[str, float] = {}
        self._fetched = Counter[tuple[str, str]]()
        self.sent = Counter[str]()
        self.nodes = {name: Relay(name, self, minority) for name in NODES}

    @property
    def uncounted(self) -> dict[str, list[Datagram]]:
        """By collector: what was sent to it twice, and not counted as perhaps sent twice."""
        once = {name: Counter[Datagram]() for name in CLIENTS}
        for node in self.nodes.values():
            for name, sent in node.once.items():
                once[name].update(sent)
        found = {name: [each for each, copies in some.items() if copies > 1] for name, some in once.items()}
        return {name: some for name, some in found.items() if some}

    @property
    def now_ns(self) -> int:
        """The time of day."""
        return int(self.now * 1e9)

    def received_ns(self, datagram: Datagram) -> int:
        """Return the time of day at which a node has taken a datagram in."""
        _, number = datagram
        return int((BEGAN + (number + 1) * STEP) * 1e9)

    def pass_time(self, seconds: float) -> None:
        """Let each node take in datagrams, and tell the others of itself, for so long."""
        for step in range(int(seconds / STEP)):
            self.now += STEP
            for name, node in self.nodes.items():
                node.arrive("ingest.1", (name, self.sent[name]))
                self.sent[name] += 1
            self._exchange()
            if step % (BEAT_SECONDS / STEP) == 0:
                self._beat()
            if step % (LOOK_SECONDS / STEP) == 0:
                for node in self.nodes.values():
                    node.node.keep_up()

    def _pairs(self) -> Iterator[tuple[str, str, str]]:
        """Yield each node, each other one, and the link between them."""
        for name in NODES:
            for other in NODES:
                if name != other:
                    yield name, other, "".join(sorted(name + other))

    def _exchange(self) -> None:
        for name, other, link in self._pairs():
            if link not in self.broken and self.now >= self._flows_at.get(link, 0.0):
                begin, self._fetched[name, other] = self._fetched[name, other], self.sent[other]
                self.nodes[name].fetch(other, range(begin, self.sent[other]))
                self.nodes[name].pending[other] = 0
            else:
                self.nodes[name].pending[other] = MOST_PENDING

    def _beat(self) -> None:
        for node in self.nodes.values():
            node.report()
        beats = {name: unparse_beat(node.cluster.beat()) for name, node in self.nodes.items() if node.cluster.tells}
        heard = [(name, other) for name, other, link in self._pairs() if other in beats and link not in self.broken]
        for name, other in heard:
            self.nodes[name].cluster.take(beat_subject(other), beats[other])
        for name in {name for name, _ in heard}:
            if self.nodes[name].cluster.members.in_doubt:
                self.nodes[name].cluster.members.note_vote()

    def heal(self, link: str, seconds: float) -> None:
        """Let a link work again, over which datagrams come after so many seconds."""
        self.broken.discard(link)
        self._flows_at[link] = self.now + seconds


@pytest.mark.parametrize("minority", ["serve", "hold"])
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
    """Each datagram that a node has taken in is sent to each collector by one of them, or counted.

    What two of them send is counted, too: by the one that takes over, or by the one that others have missed.
    """
    world = World(monkeypatch, minority)
    world.pass_time(8)
    world.broken.update(broken)
    world.pass_time(seconds)
    for link, later, pause in healed:
        world.heal(link, later)
        world.pass_time(pause)
    world.pass_time(40)
    lost = {
        name: [
            each
            for each in ((node, number) for node in NODES for number in range(world.sent[node]))
            if each not in found
        ]
        for name, found in world.outcomes.items()
    }
    assert {name: some[:3] for name, some in lost.items() if some} == {}
    assert world.outcomes.keys() == CLIENTS.keys()
    assert {name: some[:3] for name, some in world.uncounted.items()} == {}
