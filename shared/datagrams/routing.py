"""Who gets what: (registry, batch) to rows for each collector. No I/O; forwarder and transmitter share it.

A row goes to a collector when its stream is wanted, then when its source is in one of the collector's prefixes, then
when the collector is the one of its group that the source's hash picks, and last when 1-in-N sampling picks it.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from shared.client import Client
from shared.datagrams.batch import DatagramBatch, Indices
from shared.datagrams.gathered import Gathered
from shared.datagrams.prefix_index import Network, PrefixIndex, disjoint
from shared.net.addresses import V4_MAPPED, pack_network

Datagrams = DatagramBatch | Gathered
"""What can be routed: datagrams of one stream."""
Mask = npt.NDArray[np.bool_]
Hashes = npt.NDArray[np.uint64]
MAPPED_HALF: Final = np.uint64(0xFFFF)
"""Of a mapped address (RFC 4291), bytes 8 to 11."""
_GOLDEN: Final = np.uint64(0x9E3779B97F4A7C15)
_MIX: Final = np.uint64(0xBF58476D1CE4E5B9)


@dataclass(frozen=True, slots=True)
class Selection:
    """The rows of a batch that go to one collector; `indices` None means all of them.

    The counts say what became of the other rows. Collectors whose selection is all rows can share what is made of it.
    """

    indices: Indices | None
    filtered: int = 0
    shared_out: int = 0
    sampled_out: int = 0


class Prefixes:
    """A set of networks, to be matched against a column of addresses."""

    def __init__(self, texts: Iterable[str]) -> None:
        packed = [pack_network(text) for text in texts]
        masks = [((1 << bits) - 1) << (128 - bits) for _, bits in packed]
        self._mapped = np.array([network.startswith(V4_MAPPED) and bits >= 96 for network, bits in packed])
        self._networks = np.array([np.frombuffer(network, ">u8") for network, _ in packed], np.uint64)
        self._masks = np.array([(mask >> 64, mask & (2**64 - 1)) for mask in masks], np.uint64)

    def match(self, halves: npt.NDArray[np.uint64]) -> Mask:
        """Which addresses, as pairs of uint64, shape (n, 2), are in any of the networks; bool, shape (n,)."""
        inside = ((halves[:, None, :] & self._masks) == self._networks).all(axis=2)
        # ::/0 and its like are IPv6 prefixes: the IPv4 addresses that we keep mapped into them are not meant.
        mapped = (halves[:, 0] == 0) & (halves[:, 1] >> np.uint64(32) == MAPPED_HALF)
        matched: Mask = (inside & (mapped[:, None] == self._mapped)).any(axis=1)
        return matched


def halves_of(batch: Datagrams) -> npt.NDArray[np.uint64]:
    """Source addresses as pairs of uint64 in network order, shape (n, 2): what prefixes and hashes work on."""
    packed = np.ascontiguousarray(batch.rows["address"])
    return packed.view(">u8").astype(np.uint64)


def mix(values: Hashes) -> Hashes:
    """A well-spread hash of uint64 values (the finalizer of splitmix64, Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * _MIX
    return values ^ (values >> np.uint64(31))


@dataclass(slots=True)
class CollectorRoute:
    """A collector as the router sees it. `matched` counts the rows that reached its sampling, for 1-in-N."""

    client: Client
    networks: tuple[Network, ...] = field(init=False)
    seed: np.uint64 = field(init=False)
    matched: int = 0

    def __post_init__(self) -> None:
        self.networks = disjoint(self.client.prefixes)
        self.seed = np.uint64(int.from_bytes(hashlib.blake2b(self.client.name.encode(), digest_size=8).digest()))


ALL_ROWS: Final = Selection(None)


class Router:
    """Routes for a set of collectors, kept by name so that sampling goes on when others come and go."""

    def __init__(self) -> None:
        self._routes: dict[str, CollectorRoute] = {}
        self._by_stream: dict[str, _StreamRoutes] = {}

    def replace(self, clients: Iterable[Client]) -> None:
        """Route to these collectors from now on; one that did not change keeps its place in its sampling."""
        before = self._routes
        self._by_stream.clear()
        self._routes = {
            client.name: known
            if (known := before.get(client.name)) and known.client == client
            else CollectorRoute(client)
            for client in clients
        }

    def clients(self, stream: str) -> list[Client]:
        """The collectors that want a stream."""
        return [route.client for route in self._routes_of(stream).all]

    def _routes_of(self, stream: str) -> "_StreamRoutes":
        found = self._by_stream.get(stream)
        if found is None:
            found = _StreamRoutes([route for route in self._routes.values() if route.client.wants(stream)])
            self._by_stream[stream] = found
        return found

    def route(self, batch: Datagrams) -> list[tuple[Client, Selection]]:
        """Return the selection of each collector that wants the batch's stream, and of whose prefixes it has a source.

        Collectors with the same prefixes share a selection.
        """
        return self._routes_of(batch.stream).route(batch)


class _StreamRoutes:
    """The routes of one stream, sorted by what it takes to find their rows."""

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

    def route(self, batch: Datagrams) -> list[tuple[Client, Selection]]:
        """As `Router.route`."""
        if not len(batch) or not (self._sets or self._picking):
            return self._everything
        matched = self._index.match(batch.rows) if self._sets else []
        routed = list(self._everything)
        for number, rows in matched:
            selection = Selection(rows, len(batch) - len(rows))
            routed += [(client, selection) for client in self._filtered[number]]
        if self._picking:
            sets = list(self._sets)
            routed += _pick(batch, self._picking, {sets[number]: rows for number, rows in matched})
        return routed


def takes_all(client: Client) -> bool:
    """Whether it takes every row of its streams."""
    return not client.prefixes and not _picks(client)


def _picks(client: Client) -> bool:
    """Whether it takes only some of the rows that its prefixes let pass."""
    return client.sample > 1 or bool(client.group)


def _pick(
    batch: Datagrams, routes: list[CollectorRoute], rows_of: dict[tuple[Network, ...], Indices]
) -> list[tuple[Client, Selection]]:
    """Selections of collectors that sample or share; `rows_of` has, by set of networks, the rows that pass."""
    wanted = {}
    for route in routes:
        passing = np.full(len(batch), not route.client.prefixes)
        if route.client.prefixes and route.networks in rows_of:
            passing[rows_of[route.networks]] = True
        wanted[route.client.name] = passing
    picked = _pick_members(halves_of(batch), routes, wanted)
    return [
        (route.client, _sample(route, wanted[route.client.name], picked.get(route.client.name))) for route in routes
    ]


def _pick_members(
    halves: npt.NDArray[np.uint64], routes: list[CollectorRoute], wanted: dict[str, Mask]
) -> dict[str, Mask]:
    """For each member of a group, the rows it takes: of those members that want a row, the one of highest weight.

    Rendezvous hashing (Thaler and Ravishankar 1998): a member that joins or leaves moves only its own share.
    """
    groups: dict[str, list[CollectorRoute]] = {}
    for route in routes:
        if route.client.group:
            groups.setdefault(route.client.group, []).append(route)
    if not groups:
        return {}
    sources = mix(halves[:, 0] * _GOLDEN ^ halves[:, 1])
    picked = {}
    for members in groups.values():
        weights = np.stack([
            np.where(wanted[route.client.name], mix(sources ^ route.seed) | np.uint64(1), np.uint64(0))
            for route in members
        ])  # fmt: skip
        winner = weights.argmax(axis=0)
        for number, route in enumerate(members):
            picked[route.client.name] = wanted[route.client.name] & (winner == number)
    return picked


def _sample(route: CollectorRoute, wanted: Mask, picked: Mask | None) -> Selection:
    mine = wanted if picked is None else picked
    matching = np.flatnonzero(mine)
    first = -route.matched % route.client.sample
    taken = matching[first :: route.client.sample]
    route.matched += len(matching)
    return Selection(
        taken,
        filtered=len(wanted) - int(np.count_nonzero(wanted)),
        shared_out=int(np.count_nonzero(wanted)) - len(matching),
        sampled_out=len(matching) - len(taken),
    )
