"""The node of a cluster that serves each collector: one of those that live, by rendezvous hash.

All nodes find the same without asking each other, as they know the same nodes and collectors. A node that comes or goes
changes the owner of its own collectors alone. No I/O.
"""

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from ipaddress import ip_address
from math import inf
from typing import Final, Literal, Self

import msgspec

from shared.bus.bodies.nodes_message import Node, Nodes, NodeState
from shared.client import MAX_PLACES, Client, Place, Resume, Source
from shared.settings.uplink import Uplink

SILENT_SECONDS: Final = 3.0
"""Time after which an uplink that says nothing of the nodes is taken for one that hears none of them."""
Minority = Literal["serve", "hold"]
LEFT_OFF: Final = "/"
"""In place of an owner: this node was that, and nobody is. No node is called so."""
RESUME_SECONDS: Final = 10.0
"""Time within which a collector that was taken over goes on where its last node has stopped; for as long the uplink
knows for certain where a silent node was."""
TOGETHER_SECONDS: Final = 20.0
"""Time within which the first of nodes that start together joins."""
BRING_SECONDS: Final = 3.0
"""Time that it may take then to bring collectors what came before."""
VIEW_SECONDS: Final = 5.0
"""Time for which it counts whom a node served without this one, as it told last before this one joined."""
LEFT_SECONDS: Final = 60.0
"""Time for which it counts where this node has left off, once others serve: one that comes back joins within it."""
LATE_NS: Final = 10_000_000_000
"""Time by which a node may have had datagrams late: of a worker of which it tells no place."""


def owner_of(key: str, nodes: Iterable[str]) -> str:
    """Return the node with the highest hash for a key; empty: there is no node.

    >>> owner_of("siem", ["a", "b", "c"]), owner_of("siem", ["a", "b"]), owner_of("siem", [])
    ('b', 'b', '')
    """
    return max(nodes, key=lambda node: (_hash(key, node), node), default="")


def _hash(key: str, node: str) -> bytes:
    return hashlib.blake2b(key.encode(), digest_size=8, key=node.encode()).digest()


def nodes_serving(told: Nodes, minority: Minority, before: Sequence[str] | None) -> tuple[str, ...]:
    """Return the nodes that serve collectors: those that live, as far as this one hears most of them.

    Otherwise it serves its own collectors as `before`, or at a start as if all lived; or it serves none.
    """
    if told.majority:
        return told.live
    every = sorted(node.name for node in told.nodes)
    return () if minority == "hold" else tuple(every if before is None else before)


class Owners:
    """The owners of collectors as the node `own` knows them. Without `nodes` this host serves all."""

    def __init__(
        self,
        own: str = "",
        nodes: Iterable[str] = (),
        minority: Minority = "serve",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.own = own
        self.nodes = tuple(nodes)
        self.majority = False
        self.serving: tuple[str, ...] | None = None
        """The nodes that serve collectors; None: that is not known yet."""
        self.changes = 0
        """Grows whenever others come to serve."""
        self._minority = minority
        self._clock = clock
        self._heard_at = clock()
        self._told: dict[str, Node] = {}
        """The nodes as they were before others came to serve: a live one that tells of more may have left off then.

        Those that serve nobody are left out: they tell of what their senders have had, and have not sent.
        """
        self._states: dict[str, NodeState] = {}
        """The nodes as they are now."""
        self.settled = True
        """False from when others come to serve until collectors are split anew."""
        self._owners: dict[tuple[str, int], str] = {}
        """By name and generation: the owner of a collector as it was known last, or LEFT_OFF; empty: nobody yet."""
        self._unserved: dict[tuple[str, int], tuple[float, float]] = {}
        """Likewise the time at which a collector was heard of that nobody served, and until when that counts."""
        self._left_at: dict[tuple[str, int], float] = {}
        """Likewise the time at which this node has left off serving a collector, or others have begun to since."""
        self._views: dict[str, dict[tuple[str, ...], float]] = {}
        """By node: the nodes among which it has shared collectors out lately, as it told; each with the last time."""
        self._resumes: dict[tuple[str, int], tuple[float, Resume]] = {}
        """Likewise of collectors that were taken over: until when they resume, and where."""

    @classmethod
    def of(cls, uplink: Uplink) -> Self:
        """Return those of a host with these settings."""
        return cls(uplink.site, uplink.nodes, uplink.minority)

    @property
    def known(self) -> bool:
        """True if it is known who serves."""
        return self.serving is not None or not self.nodes

    def note(self, body: Nodes) -> bool:
        """Note what the uplink tells of the nodes; return whether others serve now."""
        self._heard_at, self.majority = self._clock(), body.majority
        changed = self._serve(body.serving)
        self._states = {node.name: node.state for node in body.nodes}
        for node in body.nodes:
            steady = node.state != "live" or (self.settled and not changed)
            if _serves(node) and (node.name not in self._told or (steady and node.age_ms < 1000 * RESUME_SECONDS)):
                self._told[node.name] = node
            if _serves(node):
                known, after = self._views.get(node.name, {}), self._heard_at - LEFT_SECONDS
                told = {serving: at for serving, at in known.items() if at > after}
                self._views[node.name] = {**told, node.serving: self._heard_at - node.age_ms / 1000}
        self.settled = self.settled and not changed
        return changed

    def check(self) -> bool:
        """Return whether others serve now, as nothing was heard of the nodes for a while; or a take-over is over."""
        if not self.nodes:
            return False
        now = self._clock()
        over = [key for key, (until, _) in self._resumes.items() if until <= now]
        for key in over:
            del self._resumes[key]
        if now < self._heard_at + SILENT_SECONDS:
            return bool(over)
        self.majority = False
        every = tuple(sorted(self.nodes))
        return self._serve(() if self._minority == "hold" else self.serving or every) or bool(over)

    def _serve(self, serving: tuple[str, ...]) -> bool:
        before, self.serving = self.serving, serving
        self.changes += serving != before
        return serving != before

    def owner(self, client: Client) -> str:
        """Return the node that serves a collector; members of a group have one. Empty: nobody does."""
        if not self.nodes:
            return self.own
        return client.node or owner_of(client.group or client.name, self.serving or ())

    def pin(self, address: str, node: str) -> str:
        """Return the only node that reaches an address, which was named at `node`, empty: here; empty: all do."""
        return (node or self.own) if self.nodes and ip_address(address).is_loopback else ""

    def split(self, clients: Mapping[str, Client], source: Source) -> tuple[dict[str, Client], dict[str, Client]]:
        """Return the collectors of a source that this node serves, and those that others serve.

        One that it takes over has to resume where its last node has got to.
        """
        self.settled = True
        if not self.nodes:
            return {**clients}, {}
        owners = {name: self.owner(client) for name, client in clients.items()}
        self._note_unserved({(name, client.generation): owners[name] for name, client in clients.items()})
        before, self._owners = self._owners, {}
        for name, client in clients.items():
            key = name, client.generation
            last = before.get(key, self.own)
            if owners[name] != self.own:
                self._resumes.pop(key, None)
                if before.get(key) in (self.own, LEFT_OFF):
                    self._left_at[key] = self._clock()
            elif last != self.own:
                self._resumes[key] = self._clock() + RESUME_SECONDS, self._take_over(client, last, source)
            nobody = LEFT_OFF if key in before else ""
            self._owners[key] = owners[name] or (last if last != self.own else nobody)
        self._left_at = {key: at for key, at in self._left_at.items() if key in self._owners}
        own = {name: self._resumed(client) for name, client in clients.items() if owners[name] == self.own}
        return own, {name: client for name, client in clients.items() if name not in own}

    def _note_unserved(self, owners: Mapping[tuple[str, int], str]) -> None:
        """Note which collectors nobody serves since they were heard of, or somebody only since a moment ago."""
        now, before, self._unserved = self._clock(), self._unserved, {}
        for key, owner in owners.items():
            since, until = before.get(key, (now, now if owner or key in self._owners else inf))
            if owner:
                until = min(until, now + BRING_SECONDS, since + TOGETHER_SECONDS)
            if now < until:
                self._unserved[key] = since, until

    def _take_over(self, client: Client, before: str, source: Source) -> Resume:
        """Return where a collector resumes; where this node served none for a while, another one has had it since."""
        now, now_ns, key = self._clock(), time.time_ns(), (client.name, client.generation)
        others = [node for node in self.serving or () if node != self.own]
        known = before if before != LEFT_OFF else ""
        since, _ = self._unserved.get(key, (now, now))
        if key in self._unserved or not (known or others):  # as far as is known, nobody has served it since
            owed = client.resume if key in self._unserved else None  # it was owed the past before, of some streams
            resume = owed or Resume(now_ns - int((now - since) * 1e9), client.generation)
            return msgspec.structs.replace(resume, streams=(), twice_until_ns=now_ns)
        nodes = self._predecessors(client, known or owner_of(client.group or client.name, others))
        told = [node.places[source] for node in nodes if source in node.places]
        latest = all(node.name == known or self._states.get(node.name) != "silent" for node in nodes)
        left_lately = now < self._left_at.get(key, -inf) + LEFT_SECONDS
        if not nodes or len(told) < len(nodes) or (left_lately and not latest):
            # None has served it since this one has left off, or it is not known how far: all since may be owed.
            return Resume(max(0, now_ns - LATE_NS), client.generation, twice_until_ns=now_ns)
        wanted = tuple([place for place in _least(told) if client.wants(place.stream)][-MAX_PLACES:])
        since_ns = max(0, min(node.since_ns for node in nodes) - LATE_NS)
        # One that lives has sent more since it told that; so may this node have, where nobody is known to follow it.
        serves_on = not known or any(self._states.get(node.name) in ("live", "joining") for node in nodes)
        until_ns = max(now_ns * serves_on, *(node.since_ns for node in nodes))
        return Resume(since_ns, places=wanted, twice_until_ns=until_ns)

    def _predecessors(self, client: Client, first: str) -> list[Node]:
        """Return the nodes that may have served a collector: the `first` one, those that other nodes name, and others.

        While links heal one after the other, a node does not hear each node that serves, nor does it know at once that
        one has left a collector to it. What each tells of itself is what counts.
        """
        key, lately = client.group or client.name, self._clock() - VIEW_SECONDS
        its = self._views.get(first, {})
        views = [(serving, at) for serving, at in its.items() if at == max(its.values())]
        for told in self._views.values():
            views += [(serving, at) for serving, at in told.items() if at > lately and self.own not in serving]
        named = {first: 0.0, **{owner_of(key, serving): at for serving, at in sorted(views, key=lambda view: view[1])}}
        left_at = self._left_at.get((client.name, client.generation), self._clock())
        found = []
        for name in self.nodes:
            since = left_at - VIEW_SECONDS if name == first else lately
            its = self._views.get(name, {})
            heard_at = max(its.values(), default=-inf)
            last = heard_at if name in named else inf  # of these that counts, unless others have named it long after
            owners = {owner_of(key, serving) for serving, at in its.items() if at > since or at == last}
            if name != self.own and (name in owners or named.get(name, -inf) > heard_at + VIEW_SECONDS):
                found.append(self._told.get(name, Node(name, "silent")))
        return found

    def _resumed(self, client: Client) -> Client:
        _, resume = self._resumes.get((client.name, client.generation), (0.0, client.resume))
        return client if resume is client.resume else msgspec.structs.replace(client, resume=resume)


def _serves(node: Node) -> bool:
    """Return whether a node has served collectors by its last beat."""
    return node.name in node.serving


def _least(told: Sequence[Sequence[Place]]) -> list[Place]:
    """Return the earliest place of each worker that all of these nodes have told a place of, and the most lacked."""
    tables = [{(each.stream, each.worker, each.boot): each for each in places} for places in told]
    common = [[table[key] for table in tables] for key in tables[0] if all(key in table for table in tables)]
    return [
        msgspec.structs.replace(min(some, key=lambda place: place.total), lacked=max(place.lacked for place in some))
        for some in common
    ]
