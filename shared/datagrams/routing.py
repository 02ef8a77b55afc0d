"""Routing of copies: (registry, batch) to rows for each collector. No I/O; forwarder and transmitter share it.

A row goes to a collector when its stream is wanted, then when its source is in one of the collector's prefixes, then
when the collector is the one of its group that the source's hash picks, and last when 1-in-N sampling picks it.
"""

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from shared.client import Client
from shared.datagrams.batch import Indices
from shared.datagrams.gathered import Mask
from shared.datagrams.prefix_index import Network, PrefixIndex, disjoint
from shared.datagrams.prefix_set import Datagrams, Prefixes, halves_of
from shared.datagrams.sampling import find_buckets, sample_rows, share_buckets, share_rows


@dataclass(frozen=True, slots=True)
class Selection:
    """The rows of a batch that go to one collector; `indices` None means all of them.

    The counts say what became of the other rows. Collectors whose selection is all rows share what is made for them.
    The kernel has sent copies `by_kernel`; of `unplanned` rows nobody knows whether it has.
    """

    indices: Indices | None
    filtered: int = 0
    shared_out: int = 0
    sampled_out: int = 0
    by_kernel: int = 0
    unplanned: int = 0


LeaveOut = Callable[[Client, Mask], tuple[Mask, Selection]]
"""Returns which of the rows that a collector wants are left to us, and what became of the others."""
GiveBack = Callable[[Sequence[Client], Mapping[str, Mask], dict[str, Mask]], None]
"""Gives rows of a group to the member that has a copy of them: it has the members, the rows that each wants, and those
that it takes, which it changes."""


@dataclass(slots=True)
class CollectorRoute:
    """A collector as the router sees it. `matched` counts the rows that reached its sampling, for 1-in-N."""

    client: Client
    matched: int = 0
    networks: tuple[Network, ...] = field(init=False)
    seed: np.uint64 = field(init=False)

    def __post_init__(self) -> None:
        self.networks = disjoint(self.client.prefixes)
        # The group's identifier is known to this host alone: without it nobody can find a name that takes a source.
        key = hashlib.blake2b(self.client.group.encode()).digest()
        name = hashlib.blake2b(self.client.name.encode(), digest_size=8, key=key)
        self.seed = np.uint64(int.from_bytes(name.digest()))


ALL_ROWS: Final = Selection(None)


class Router:
    """Routes for a set of collectors, kept by name so that sampling goes on when others come and go."""

    def __init__(self) -> None:
        self._routes: dict[str, CollectorRoute] = {}
        self._by_stream: dict[str, _StreamRoutes] = {}

    def replace(self, clients: Iterable[Client]) -> None:
        """Route to these collectors from now on; one at the same address and port keeps its place in its sampling."""
        before, self._routes = self._routes, {}
        self._by_stream.clear()
        for client in clients:
            known = before.get(client.name)
            if known and known.client != client:
                known = CollectorRoute(client, known.matched) if _samples_alike(known.client, client) else None
            self._routes[client.name] = known or CollectorRoute(client)

    def clients(self, stream: str) -> list[Client]:
        """The collectors that want a stream."""
        return [route.client for route in self._routes_of(stream).all]

    def _routes_of(self, stream: str) -> "_StreamRoutes":
        found = self._by_stream.get(stream)
        if found is None:
            found = _StreamRoutes([route for route in self._routes.values() if route.client.wants(stream)])
            self._by_stream[stream] = found
        return found

    def route(
        self,
        batch: Datagrams,
        leave_out: LeaveOut | None = None,
        give_back: GiveBack | None = None,
        joining: Collection[str] = (),
    ) -> list[tuple[Client, Selection]]:
        """Return the selection of each collector that wants the batch's stream and has a prefix that matches a source.

        Collectors with the same prefixes share a selection. Samples are taken of what `leave_out` leaves to us. Members
        of a group that are `joining` take only what no other member wants.
        """
        return self._routes_of(batch.stream).route(batch, leave_out, give_back, joining)

    def takers(
        self, batch: Datagrams, names: Collection[str], joining: Collection[str] = ()
    ) -> list[tuple[Client, Mask, Mask]]:
        """Return, for those of these collectors that want the batch's stream, the rows that their prefixes let pass.

        The second mask has those among them that go to no other member of their group. Sampling counts none.
        """
        routes = self._routes_of(batch.stream).all
        members = [route for route in routes if route.client.group]
        asked = [route for route in routes if route.client.name in names]
        passing = {route.client.name: _passing(batch, route.client) for route in (*members, *asked)}
        own = passing | _pick_members(batch, members, passing, None, joining)
        return [(route.client, passing[route.client.name], own[route.client.name]) for route in asked]

    def picking(self, stream: str) -> dict[str, str]:
        """Return the collectors that get only some of what their prefixes let pass of a stream, and their groups."""
        return {each.client.name: each.client.group for each in self._routes_of(stream).all if _picks(each.client)}


class _StreamRoutes:
    """The routes of one stream, sorted by the work needed to find their rows."""

    def __init__(self, routes: list[CollectorRoute]) -> None:
        self.all = routes
        self._everything = [(each.client, ALL_ROWS) for each in routes if takes_all(each.client)]
        self._sets: dict[tuple[Network, ...], list[CollectorRoute]] = {}
        for route in routes:
            if route.client.prefixes:
                self._sets.setdefault(route.networks, []).append(route)
        self._index = PrefixIndex(list(self._sets))
        self._filtered = [
            [route.client for route in sharing if not _picks(route.client)] for sharing in self._sets.values()
        ]
        self._picking = [route for route in routes if _picks(route.client)]

    def route(
        self, batch: Datagrams, leave_out: LeaveOut | None, give_back: GiveBack | None, joining: Collection[str]
    ) -> list[tuple[Client, Selection]]:
        """Do as `Router.route` says."""
        if not len(batch) or not (self._sets or self._picking):
            return self._everything
        matched = self._index.match(batch.rows) if self._sets else []
        routed = list(self._everything)
        for number, rows in matched:
            selection = Selection(rows, len(batch) - len(rows))
            routed += [(client, selection) for client in self._filtered[number]]
        if self._picking:
            sets = list(self._sets)
            rows_of = {sets[number]: rows for number, rows in matched}
            routed += _pick(batch, self._picking, rows_of, leave_out, give_back, joining)
        return routed


def takes_all(client: Client) -> bool:
    """Return whether a client takes every row of its streams."""
    return not client.prefixes and not _picks(client)


def _passing(batch: Datagrams, client: Client) -> Mask:
    """Return the rows that a client's prefixes let pass, without an index: for batches that are rare."""
    return Prefixes(client.prefixes).match(halves_of(batch)) if client.prefixes else np.full(len(batch), True)


def _samples_alike(one: Client, other: Client) -> bool:
    return (one.address, one.port, one.sample) == (other.address, other.port, other.sample)


def _picks(client: Client) -> bool:
    """Return whether a client takes only some of the rows that its prefixes let pass."""
    return client.sample > 1 or bool(client.group)


def _pick(
    batch: Datagrams,
    routes: list[CollectorRoute],
    rows_of: dict[tuple[Network, ...], Indices],
    leave_out: LeaveOut | None,
    give_back: GiveBack | None,
    joining: Collection[str],
) -> list[tuple[Client, Selection]]:
    """Return selections of collectors that sample or share; `rows_of` has, by set of networks, the rows that pass."""
    wanted = {}
    for route in routes:
        passing = np.full(len(batch), not route.client.prefixes)
        if route.client.prefixes and route.networks in rows_of:
            passing[rows_of[route.networks]] = True
        wanted[route.client.name] = passing
    picked = _pick_members(batch, routes, wanted, give_back, joining)
    return [
        (route.client, _select(route, wanted[route.client.name], picked.get(route.client.name), leave_out))
        for route in routes
    ]


def _pick_members(
    batch: Datagrams,
    routes: list[CollectorRoute],
    wanted: dict[str, Mask],
    give_back: GiveBack | None,
    joining: Collection[str],
) -> dict[str, Mask]:
    """Return, for each member of a group, the rows that it takes."""
    groups: dict[str, list[CollectorRoute]] = {}
    for route in routes:
        if route.client.group:
            groups.setdefault(route.client.group, []).append(route)
    if not groups:
        return {}
    buckets = find_buckets(batch)
    picked: dict[str, Mask] = {}
    for members in groups.values():
        names = [route.client.name for route in members]
        contended = _contended(names, wanted, joining) if joining else [wanted[name] for name in names]
        shares = share_rows(buckets, [route.seed for route in members], contended)
        taken = dict(zip(names, shares, strict=True))
        if give_back:
            give_back([route.client for route in members], wanted, taken)
        picked |= taken
    return picked


def _contended(names: Sequence[str], wanted: Mapping[str, Mask], joining: Collection[str]) -> list[Mask]:
    """Return the rows that each member of a group may take: one that is joining, those that no other member wants."""
    others = np.any([wanted[name] for name in names if name not in joining], axis=0)
    return [wanted[name] & ~others if name in joining else wanted[name] for name in names]


def shares_of(members: Sequence[Client]) -> dict[str, bytes]:
    """Return, by name, the buckets of sources that members of one group take, if all of them want the same."""
    shares = share_buckets([CollectorRoute(each).seed for each in members])
    return {member.name: share for member, share in zip(members, shares, strict=True)}


def _select(route: CollectorRoute, wanted: Mask, picked: Mask | None, leave_out: LeaveOut | None) -> Selection:
    rows, left = wanted if picked is None else picked, ALL_ROWS
    passed, kept = int(np.count_nonzero(wanted)), int(np.count_nonzero(rows))
    if leave_out and route.client.sample > 1:
        rows, left = leave_out(route.client, rows)
    matching = np.flatnonzero(rows)
    sampled = sample_rows(matching, route.client.sample, route.matched)
    route.matched += len(matching)
    return Selection(
        sampled,
        filtered=len(wanted) - passed,
        shared_out=passed - kept,
        sampled_out=len(matching) - len(sampled) + left.sampled_out,
        by_kernel=left.by_kernel,
        unplanned=left.unplanned,
    )
