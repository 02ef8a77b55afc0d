"""Three nodes by a clock of the test, whose links break and heal, and that are killed and started again.

Datagrams, rings and JetStream are played; what nodes tell each other, and where collectors go on, is the real thing.
"""

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from itertools import count
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
from shared.bus.bodies.nodes_message import Nodes
from shared.bus.continuity import Position, Worker
from shared.bus.messages import Envelope, Status
from shared.client import Client, Place, Resume
from shared.fanout.catch_up.progress import LeftOff, possible_places, with_beginnings
from shared.fanout.catch_up.rings import RING_SECONDS
from shared.fanout.sending.perhaps_twice import PerhapsTwice
from shared.ledger.accounts import unparse_origin
from shared.ledger.counters import PERHAPS_TWICE, SENT
from shared.serving_nodes import Minority, Owners
from shared.settings.uplink import Uplink
from tests.builders import make_client

NODES: Final = ("a", "b", "c")
LINKS: Final = ("ab", "ac", "bc")
STREAM: Final = "flows"
INGEST: Final = "ingest.1"
UPLINK: Final = "uplink.1"
STEP: Final = LOOK_SECONDS / 2
"""Seconds between two datagrams of a node."""
CHECK_SECONDS: Final = 1.0
BEGAN: Final = 100.0
CLIENTS: Final = {name: make_client(name, streams=(STREAM,)) for name in map(str, range(12))}
Datagram = tuple[str, int]
"""Its node, and its number there."""


class Disk:
    """Keeps over a kill what a node's workers have published, whom it served, and how often it missed others."""

    def __init__(self) -> None:
        self.published: dict[Worker, list[Datagram]] = {}
        self.served: set[str] = set()
        self.missing: Counter[str] = Counter()


class Counted(PerhapsTwice):
    """Takes what is counted out of what was sent `once`."""

    def __init__(
        self, once: Mapping[str, list[Datagram]], clock: Callable[[], float], time_ns: Callable[[], int]
    ) -> None:
        super().__init__(clock, time_ns)
        self._sent = once

    def _count(self, name: str, copies: int, *, left: bool) -> None:
        super()._count(name, copies, left=left)
        del self._sent[name][len(self._sent[name]) - copies :]


class Relay:
    """A start of a node: its part in the cluster, and a forwarder that is played to."""

    def __init__(self, name: str, boot: int, world: "World", minority: Minority, disk: Disk) -> None:
        self.name, self.boot, self._world, self._disk = name, boot, world, disk
        settings = Uplink(servers=("nats://127.0.0.1:4222",), site=name, nodes=NODES, minority=minority)
        publisher = Mock(sender=UPLINK, boot=boot, publish=self._take_nodes)
        self.pending: dict[str, int] = {}
        self.node = Node(settings, publisher, Mock(), Counter(), lambda: self.pending)
        clock, time_ns = (lambda: world.now), (lambda: world.now_ns)
        self.cluster = self.node._cluster = Cluster(
            name, NODES, minority, UPLINK, boot, clock, time_ns, missing=disk.missing
        )
        self.node._connected_at, self._began_ns = world.now, world.now_ns
        self._owners = Owners(name, NODES, minority, clock)
        self._own: dict[str, Client] = {}
        self.accounts: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.once: defaultdict[str, list[Datagram]] = defaultdict(list)
        """By collector: what was sent to it, and not counted as perhaps sent twice."""
        self._perhaps_twice = Counted(self.once, clock, time_ns)
        self.subscribed = False
        """True once collectors are known, and streams are followed for them."""
        self._baselines: dict[Worker, int] = {}
        """The counts of workers before which nothing is owed, as collectors were heard of for the first time."""
        self._served_before = {*disk.served}
        self._left_off = LeftOff()
        for client in (CLIENTS[each] for each in disk.served):
            self._left_off.note(client, self._places())
        self._is_first = not disk.published
        self._ring: dict[Worker, deque[tuple[float, int]]] = {}
        for worker in (INGEST, UPLINK):
            disk.published[worker, boot] = []
            self._ring[worker, boot] = deque()
        self._let_go: Counter[Worker] = Counter()
        self._reports = 0

    def _places(self) -> list[Place]:
        return [Place(STREAM, *worker, 0, len(some)) for worker, some in self._disk.published.items()]

    def _take_nodes(self, _: str, told: Nodes) -> bool:
        self._perhaps_twice.note(told.nodes, {name: self.accounts[name] for name in self._own})
        if self._owners.note(told) or not self.subscribed:
            self._split()
        return True

    def check(self) -> None:
        """Do what is due each second."""
        if self._owners.check():
            self._split()

    def _split(self) -> None:
        clients, elsewhere = self._owners.split(CLIENTS, "relay")
        for name in self._own.keys() - clients.keys():
            self._left_off.note(CLIENTS[name], self._places())
        first, fresh = not self.subscribed, clients.keys() - self._own.keys()
        self._own, self.subscribed, self._disk.served = clients, True, {*clients}
        until_ns = (client.resume.twice_until_ns for client in clients.values() if client.resume)
        self._perhaps_twice.until_ns = max(self._perhaps_twice.until_ns, *until_ns, 0)
        here = [place for place in self._places() if not (first and place.boot == self.boot)]
        if first:
            fresh = self._begin(fresh)
        for name in sorted(fresh):
            if resume := clients[name].resume:
                self._resume(name, resume)
        self._left_off.follow(elsewhere.values(), lambda _: here)

    def _begin(self, served: Set[str]) -> set[str]:
        """Begin to follow workers; return those of the collectors `served` that the last process has not served.

        To the others is known to be owed what has come before.
        """
        came = self._disk.published[INGEST, self.boot]
        if self._is_first:
            self._baselines[INGEST, self.boot] = len(came)
            self._world.not_owed.update(came)
        for name in served & self._served_before:
            self._world.counted[name].update(came)
        return {*served} - self._served_before

    def _resume(self, name: str, resume: Resume) -> None:
        """Send a collector what it is owed, as far as the ring has it, and count the rest."""
        published, rings = self._disk.published, {worker: self._kept(worker) for worker in self._disk.published}
        followed = {each: Position(0, self._baselines.get(each, 0), len(some)) for each, some in published.items()}
        window = Mock(find=lambda worker, _: bool(rings[worker]) if worker in rings else False)
        living = [worker for worker in published if worker[1] == self.boot]
        found: Iterable[Place] = possible_places(
            resume.places, living, window, followed, sent=name in self._served_before
        )
        lacked = sum(place.lacked for place in resume.places)
        if (here := self._left_off.places(name, resume.generation)) is not None:
            found, lacked = with_beginnings(STREAM, here, followed, self._let_go)
        self._world.lacked[name] += lacked
        places = {(each.worker, each.boot): each.total for each in found}
        for worker, some in published.items():
            first = rings[worker][0] if rings[worker] else len(some)
            for number in range(places.get(worker, first), len(some)):
                if number < first:
                    self._world.counted[name][some[number]] += 1
                else:
                    self._send(name, some[number])

    def _kept(self, worker: Worker) -> list[int]:
        """Return the numbers of what the ring has of a worker."""
        return [number for at, number in self._ring.get(worker, ()) if at >= self._world.now - RING_SECONDS]

    def _send(self, name: str, datagram: Datagram) -> None:
        """Send a copy to a collector; it is counted as perhaps sent twice if another node may have sent it before."""
        self._world.delivered[name][datagram] += 1
        self.accounts[name][SENT] += 1
        if self._world.received_ns(datagram) < self._perhaps_twice.until_ns:
            self.accounts[name][PERHAPS_TWICE] += 1
        else:
            self.once[name].append(datagram)

    def arrive(self, worker: str, datagram: Datagram) -> None:
        """Let a datagram come by the bus."""
        some, ring = self._disk.published[worker, self.boot], self._ring[worker, self.boot]
        if self.subscribed:
            ring.append((self._world.now, len(some)))
        while ring and ring[0][0] < self._world.now - RING_SECONDS:
            _, number = ring.popleft()
            self._let_go[worker, self.boot] += self._world.received_ns(some[number]) >= self._began_ns
        some.append(datagram)
        for name in self._own:
            self._send(name, datagram)

    def fetch(self, origin: Key, there: range, datagrams: list[Datagram]) -> None:
        """Let datagrams of another node come by the uplink."""
        here = len(self._disk.published[UPLINK, self.boot])
        self.node.note_crossed(origin, there, range(here, here + len(there)))
        for datagram in datagrams:
            self.arrive(UPLINK, datagram)

    def report(self) -> None:
        """Let the forwarder report."""
        self._reports += 1
        accounts = {
            unparse_origin(*worker, STREAM): {"reached": len(some), "baseline": 0}
            for worker, some in self._disk.published.items()
        }
        status = Status("forwarder", 1, self._began_ns, self._reports, 0, 1, {"forwarder": {"revision": 1}, **accounts})
        self.node.note_status(Envelope(1, "status", "forwarder.1", self.boot, self._reports, 0), status)


class World:
    """Three nodes, and the links that are broken; of one that heals, datagrams come some seconds after beats."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, minority: Minority) -> None:
        self.now = BEGAN
        clock = SimpleNamespace(monotonic=lambda: self.now, time_ns=lambda: self.now_ns)
        monkeypatch.setattr(module, "time", clock)
        monkeypatch.setattr(shared.serving_nodes, "time", clock)
        self.delivered: defaultdict[str, Counter[Datagram]] = defaultdict(Counter)
        """By collector: how often each datagram was sent to it."""
        self.counted: defaultdict[str, Counter[Datagram]] = defaultdict(Counter)
        """By collector: how often each datagram was counted as one that can't be had."""
        self.lacked = Counter[str]()
        """By collector: the datagrams that were counted so, without knowing which ones."""
        self.broken: set[str] = set()
        self._flows_at: dict[str, float] = {}
        self._steps = count()
        self._boots = count(1)
        self._minority: Minority = minority
        self.taken: dict[str, list[int]] = {name: [] for name in NODES}
        """By node: the time, in ns since 1970, at which it has taken in each datagram."""
        self._starts: dict[str, list[tuple[int, int]]] = {name: [] for name in NODES}
        """By node: the boot id of each of its starts, and the number of the first datagram."""
        self._kept: dict[str, list[int]] = {name: [] for name in NODES}
        """By node: the numbers of the datagrams that JetStream has."""
        self._acknowledged = Counter[str]()
        self._fetched = Counter[tuple[str, str]]()
        self.not_owed: set[Datagram] = set()
        """Datagrams that came before collectors were heard of, or were in the hands of an uplink when it was killed.

        The next start of that counts it as `dropped_unsure`.
        """
        self._disks = {name: Disk() for name in NODES}
        self.relays: list[Relay] = []
        self.nodes: dict[str, Relay] = {}
        for name in NODES:
            self.start(name)

    @property
    def now_ns(self) -> int:
        """The time of day."""
        return int(self.now * 1e9)

    def start(self, name: str) -> None:
        """Start a node, also again."""
        if name not in self.nodes:
            relay = Relay(name, next(self._boots), self, self._minority, self._disks[name])
            self.nodes[name] = relay
            self.relays.append(relay)
            self._starts[name].append((relay.boot, len(self.taken[name])))

    def kill(self, name: str) -> None:
        """Kill all of a node; what JetStream has not acknowledged by then does not get to other nodes."""
        if self.nodes.pop(name, None):
            numbers = range(self._acknowledged[name], len(self.taken[name]))
            self.not_owed |= {(name, number) for number in numbers}
            self._acknowledged[name] = len(self.taken[name])

    def received_ns(self, datagram: Datagram) -> int:
        """Return the time of day at which a node has taken a datagram in."""
        name, number = datagram
        return self.taken[name][number]

    def pass_time(self, seconds: float) -> None:
        """Let each node take in datagrams, and tell the others of itself, for so long."""
        for step in (next(self._steps) for _ in range(int(seconds / STEP))):
            self.now += STEP
            for name, node in self.nodes.items():
                number = len(self.taken[name])
                self.taken[name].append(self.now_ns)
                node.arrive(INGEST, (name, number))
            self._exchange()
            if step % (BEAT_SECONDS / STEP) == 0:
                self._beat()
            if step % (LOOK_SECONDS / STEP) == 0:
                for node in self.nodes.values():
                    node.node.keep_up()
            if step % (CHECK_SECONDS / STEP) == 0:
                for node in self.nodes.values():
                    node.check()

    def _pairs(self) -> Iterator[tuple[str, str, str]]:
        """Yield each node that runs, each other one, and the link between them."""
        for name in self.nodes:
            for other in NODES:
                if name != other:
                    yield name, other, "".join(sorted(name + other))

    def _flows(self, link: str) -> bool:
        return link not in self.broken and self.now >= self._flows_at.get(link, 0.0) and {*link} <= self.nodes.keys()

    def _exchange(self) -> None:
        for name, _other, link in self._pairs():
            if self._flows(link):  # most servers of JetStream are there
                new = range(self._acknowledged[name], len(self.taken[name]))
                self._kept[name] += new
                self._acknowledged[name] = new.stop
        for name, other, link in self._pairs():
            third = next(each for each in NODES if each not in (name, other))
            by_third = other not in self.nodes and self._flows("".join(sorted(name + third)))
            if self._flows(link) or by_third:
                self._fetch(name, other)

    def _fetch(self, name: str, other: str) -> None:
        if not self.nodes[name].subscribed:
            return
        kept = self._kept[other]
        new, self._fetched[name, other] = kept[self._fetched[name, other] :], len(kept)
        self.nodes[name].pending[other] = 0
        starts = self._starts[other]
        for (boot, begin), (_, end) in zip(starts, [*starts[1:], (0, len(self.taken[other]))], strict=True):
            some = [number for number in new if begin <= number < end]
            if some:
                there = range(some[0] - begin, some[-1] + 1 - begin)
                self.nodes[name].fetch(Key(other, INGEST, boot, STREAM), there, [(other, each) for each in some])

    def _beat(self) -> None:
        for node in self.nodes.values():
            node.report()
        beats = {name: unparse_beat(node.cluster.beat()) for name, node in self.nodes.items() if node.cluster.tells}
        near = [(name, other) for name, other, link in self._pairs() if other in self.nodes and link not in self.broken]
        for name, other in near:
            if other in beats:
                self.nodes[name].cluster.take(beat_subject(other), beats[other])
        for name in {name for name, _ in near}:
            if self.nodes[name].cluster.members.in_doubt:
                self.nodes[name].cluster.members.note_vote()

    def heal(self, link: str, seconds: float) -> None:
        """Let a link work again, over which datagrams come after so many seconds."""
        self.broken.discard(link)
        self._flows_at[link] = self.now + seconds

    @property
    def lost(self) -> dict[str, list[Datagram]]:
        """By collector: what was not sent to it, and is in no account."""
        taken = {(name, number) for name, times in self.taken.items() for number in range(len(times))} - self.not_owed
        found = {name: sorted(taken - self.delivered[name].keys() - self.counted[name].keys()) for name in CLIENTS}
        return {name: some for name, some in found.items() if len(some) > self.lacked[name]}

    def uncounted(self, relays: Iterable[Relay]) -> dict[str, list[Datagram]]:
        """By collector: what was sent to it twice by these starts, and not counted as perhaps sent twice."""
        once = {name: Counter[Datagram]() for name in CLIENTS}
        for relay in relays:
            for name, sent in relay.once.items():
                once[name].update(sent)
        found = {name: sorted(each for each, copies in some.items() if copies > 1) for name, some in once.items()}
        return {name: some for name, some in found.items() if some}
