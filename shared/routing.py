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

from shared.addresses import V4_MAPPED, pack_network
from shared.batch import DatagramBatch, Indices
from shared.gathering import Gathered
from shared.registry import Client

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
class Route:
    """A collector as the router sees it. `matched` counts the rows that reached its sampling, for 1-in-N."""

    client: Client
    prefixes: Prefixes | None = field(init=False)
    seed: np.uint64 = field(init=False)
    matched: int = 0

    def __post_init__(self) -> None:
        self.prefixes = Prefixes(self.client.prefixes) if self.client.prefixes else None
        self.seed = np.uint64(int.from_bytes(hashlib.blake2b(self.client.name.encode(), digest_size=8).digest()))


ALL_ROWS: Final = Selection(None)


class Router:
    """Routes for a set of collectors, kept by name so that sampling goes on when others come and go."""

    def __init__(self) -> None:
        self._routes: dict[str, Route] = {}
        self._by_stream: dict[str, list[Route]] = {}

    def replace(self, clients: Iterable[Client]) -> None:
        """Route to these collectors from now on; one that did not change keeps its place in its sampling."""
        before = self._routes
        self._by_stream.clear()
        self._routes = {
            client.name: known if (known := before.get(client.name)) and known.client == client else Route(client)
            for client in clients
        }

    def routes(self, stream: str) -> list[Route]:
        """The collectors that want a stream."""
        found = self._by_stream.get(stream)
        if found is None:
            found = [route for route in self._routes.values() if route.client.wants(stream)]
            self._by_stream[stream] = found
        return found

    def route(self, batch: Datagrams) -> list[tuple[Client, Selection]]:
        """Return the selection of each collector that wants the batch's stream."""
        routes = self.routes(batch.stream)
        plain = [(route.client, ALL_ROWS) for route in routes if _takes_all(route)]
        if len(plain) == len(routes) or not len(batch):
            return plain
        return plain + _select(batch, [route for route in routes if not _takes_all(route)])


def _takes_all(route: Route) -> bool:
    return route.prefixes is None and route.client.sample == 1 and not route.client.group


def _select(batch: Datagrams, routes: list[Route]) -> list[tuple[Client, Selection]]:
    halves = halves_of(batch)
    everything = np.ones(len(batch), np.bool_)
    wanted = {route.client.name: route.prefixes.match(halves) if route.prefixes else everything for route in routes}
    picked = _pick_members(halves, routes, wanted)
    return [
        (route.client, _sample(route, wanted[route.client.name], picked.get(route.client.name))) for route in routes
    ]


def _pick_members(halves: npt.NDArray[np.uint64], routes: list[Route], wanted: dict[str, Mask]) -> dict[str, Mask]:
    """For each member of a group, the rows it takes: of those members that want a row, the one of highest weight.

    Rendezvous hashing (Thaler and Ravishankar 1998): a member that joins or leaves moves only its own share.
    """
    groups: dict[str, list[Route]] = {}
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


def _sample(route: Route, wanted: Mask, picked: Mask | None) -> Selection:
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
