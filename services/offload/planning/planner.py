"""The plan: for each collector the copies that the kernel makes, or the reason why it can't. Pure; no I/O.

A generation serves a collector entirely or not at all: every datagram with its mark was copied for each collector in
it. So what depends on a collector decides whether it is in the plan. What depends on a datagram, such as its length,
holds for all collectors of the plan: the rules let other datagrams go up unmarked.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

import msgspec

from services.offload.kernel_plan import (
    MAX_COPIES,
    MAX_INTERFACES,
    MAX_LISTENERS,
    MAX_REQUEST,
    MAX_SHARED,
    MAX_STREAMS,
    NO_COPIES,
    Copy,
    KernelPlan,
    Listener,
    Prefix,
    StreamCopies,
    count_shared,
)
from services.offload.source_classes import MAX_RENDERED, TooManyError, divide
from shared.client import Client, Trouble
from shared.datagrams.routing import shares_of
from shared.net.addresses import V4_MAPPED, is_inside, pack_network

OVERLAPPING: Final = "the prefixes of too many collectors overlap"
UNLIKE: Final = "members of its group differ in streams or prefixes"
GROUPS: Final = "there are too many groups"
MANY_PLACES: Final = "its streams have too many addresses and ports together"
LARGE: Final = "there are too many collectors, with their prefixes, for one plan"

COPIES_BYTES: Final = MAX_REQUEST * 3 // 4
STREAMS_BYTES: Final = MAX_REQUEST // 4 - 4096
"""Room in a plan for copies, and for streams beside the places of their copies."""
COPY_BYTES: Final = 360
PREFIX_BYTES: Final = 24
INDEX_BYTES: Final = 3
STREAM_BYTES: Final = 100
LISTENER_BYTES: Final = 24
"""The most that they take in a packed plan: a copy without prefixes and share, a copy's place in a stream."""

MAX_LENGTH: Final = 65_535
"""Bytes of an IP packet."""

Place = tuple[str, int]
"""An address and a port."""
Listeners = dict[int, dict[str, tuple[Listener, ...]]]
"""By IP version and stream."""


@dataclass(frozen=True, slots=True)
class Way:
    """The frames to a collector: link, link addresses, MTU."""

    link_index: int
    next_hop: bytes
    link_address: bytes
    mtu: int


@dataclass(frozen=True, slots=True)
class Facts:
    """The facts that a plan is made of, beside the registry: all of it may change at any moment.

    `listeners` has the UDP addresses and ports of each stream at which datagrams of other hosts come. `way_to` finds
    the way to an address from one of this host's (empty: from an exporter's), or the reason why the kernel's copies
    have none. `relays` has, by collector's address and
    port, the address and port that the forwarder sends from. `interfaces` are those of the settings that are there,
    with their MTU.
    """

    listeners: Mapping[str, Collection[Place]]
    interfaces: Mapping[str, int]
    way_to: Callable[[str, str], Way | str]
    relays: Mapping[Place, Place]
    troubled: Mapping[tuple[str, int], Trouble | None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of the settings: networks that copies go to, for all and for those with the exporter's address."""

    destinations: tuple[str, ...]
    original_destinations: tuple[str, ...]
    unseen: tuple[str, ...] = ()
    """`[offload] unseen`: streams that only collectors want."""
    rate_limited: bool = False
    """`[transmitter] frames_per_second`: the kernel's copies would not count."""


@dataclass(frozen=True, slots=True)
class Served:
    """A collector in the plan, with those of its streams that the kernel copies."""

    client: Client
    streams: tuple[str, ...]
    copy: Copy
    mtu: int


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan: the collectors served, by IP version; and the reasons why others are not, by name."""

    served: Mapping[int, tuple[Served, ...]]
    reasons: Mapping[str, str]
    interfaces: tuple[str, ...] = ()
    streams: Mapping[int, tuple[StreamCopies, ...]] = field(default_factory=dict)
    """By IP version, with generation 1 and places in that version's list: `number` gives them their own."""

    @property
    def rules(self) -> tuple[object, ...]:
        """Everything that rules and generations are made of: plans that are equal in it need no hand-over."""
        return tuple(
            (version, self.interfaces, self.served[version], self.streams[version]) for version in self.versions
        )

    @property
    def versions(self) -> tuple[int, ...]:
        """The IP versions that need a generation."""
        return tuple(version for version, served in self.served.items() if served)


def make_plan(clients: Iterable[Client], facts: Facts, limits: Limits, counter_of: Callable[[str], int]) -> Planned:
    """Return the plan for these clients; `counter_of` gives a name its number, always the same."""
    clients = list(clients)
    reasons: dict[str, str] = {}
    found: dict[int, list[Served]] = {4: [], 6: []}
    listeners = _listeners(facts)
    shares = _shares(clients)
    for client in clients:
        if not client.streams:
            continue
        share = shares.get(client.name) if client.group else b""
        served = UNLIKE if share is None else _serve(client, share, facts, listeners, limits, counter_of)
        if isinstance(served, str):
            reasons[client.name] = served
        else:
            found[_version(client.address)].append(served)
    for version, served_all in found.items():
        found[version], dropped = _within_bounds(served_all, version)
        reasons |= dropped
    reasons |= _drop_beyond_size(found)
    left = [client for client in clients if client.name in reasons]
    unseen = {version: {*limits.unseen} - _seen(left, found, version, facts) for version in found}
    streams = {
        version: _streams(served, version, listeners[version], facts, counter_of, unseen[version])
        for version, served in found.items()
    }
    return Planned(
        {version: tuple(served) for version, served in found.items()},
        reasons,
        tuple(sorted(facts.interfaces))[:MAX_INTERFACES],
        streams,
    )


def _packed(address: str) -> bytes:
    """Return an address as 4 or 16 bytes."""
    packed, _ = pack_network(address)
    return packed if _version(address) == 6 else packed[12:]


def _version(address: str) -> int:
    return 6 if ":" in address else 4


def _shares(clients: Iterable[Client]) -> dict[str, bytes]:
    """Return the buckets of each member of a group whose members all want the same, as the senders find them."""
    groups: dict[tuple[str, str], list[Client]] = {}
    for client in clients:
        if client.group and client.streams:
            groups.setdefault((client.group, client.source), []).append(client)
    shares: dict[str, bytes] = {}
    for members in groups.values():
        if len({(frozenset(member.streams), frozenset(member.prefixes)) for member in members}) == 1:
            shares |= shares_of(members)
    return shares


def _listeners(facts: Facts) -> Listeners:
    """Return the listeners that a plan has room for; a stream that has too many in a version has none there."""
    found: Listeners = {4: {}, 6: {}}
    left = STREAMS_BYTES
    for name, places in facts.listeners.items():
        for version, streams in found.items():
            some = [place for place in sorted(places) if _version(place[0]) == version]
            size = STREAM_BYTES + LISTENER_BYTES * len(some)
            if 0 < len(some) <= MAX_LISTENERS and size <= left and len(streams) < MAX_STREAMS // 2:
                streams[name] = tuple(Listener(_packed(address), port) for address, port in some)
                left -= size
    return found


def _serve(
    client: Client,
    share: bytes,
    facts: Facts,
    listeners: Listeners,
    limits: Limits,
    counter_of: Callable[[str], int],
) -> Served | str:
    """Return how a collector is served, or the reason why it is not."""
    reason = _reason_without_way(client, facts, limits)
    if reason:
        return reason
    version = _version(client.address)
    streams = tuple(name for name in listeners[version] if client.wants(name))
    if not facts.interfaces:
        return "no interface of [offload] interfaces is there"
    if not streams:
        wanted = [places for name, places in facts.listeners.items() if client.wants(name)]
        if any(_version(address) == version for places in wanted for address, _ in places):
            return MANY_PLACES
        return f"its streams have no udp:// listener for other hosts over IPv{version}, or offload = false"
    prefixes = tuple(_prefixes(client, version))
    if client.prefixes and not prefixes:
        return f"no prefix of it is of IPv{version}"
    relay = facts.relays.get((client.address, client.port)) if client.source == "relay" else None
    if client.source == "relay" and relay is None:
        return "the forwarder has no socket for it"
    way = facts.way_to(client.address, relay[0] if relay else "")
    if isinstance(way, str):
        return way
    copy = Copy(
        client.name,
        counter_of(f"collector/{client.name}"),
        way.link_index,
        way.next_hop,
        way.link_address,
        _packed(client.address),
        client.port,
        _packed(relay[0]) if relay else b"",
        relay[1] if relay else 0,
        client.hop_limit,
        client.dscp,
        prefixes,
        client.sample,
        share,
    )
    return Served(client, streams, copy, way.mtu)


def _reason_without_way(client: Client, facts: Facts, limits: Limits) -> str:
    """Return why a collector can't be served, whatever the way to it; empty: nothing is known against it."""
    if client.withheld:
        return "its copies are withheld"
    if client.resume or client.catch_up:
        return "it catches up from the journal: the kernel does not know where it has got to"
    if trouble := facts.troubled.get((client.name, client.generation)):
        return f"it is {trouble}"
    if not is_inside(client.address, limits.destinations):
        return "its address is not in [offload] destinations"
    if client.source == "original" and not is_inside(client.address, limits.original_destinations):
        return "its address is not in [transmitter] destinations"
    if client.source == "original" and limits.rate_limited:
        return "[transmitter] frames_per_second limits its copies"
    return ""


def _prefixes(client: Client, version: int) -> Iterable[Prefix]:
    """Yield the prefixes of a client that are of this version."""
    for text in client.prefixes:
        packed, bits = pack_network(text)
        if packed.startswith(V4_MAPPED) and bits >= 96:
            if version == 4:
                yield Prefix(packed[12:], bits - 96)
        elif version == 6:
            yield Prefix(packed, bits)


def kernel_plan(planned: Planned, generations: Mapping[int, int]) -> KernelPlan:
    """Return the plan for the applier, marked with a generation for each IP version."""
    copies: list[Copy] = []
    streams: list[StreamCopies] = []
    for version in planned.versions:
        first = len(copies)
        copies += [each.copy for each in planned.served[version]]
        streams += [
            msgspec.structs.replace(
                stream, generation=generations[version], copies=tuple(first + place for place in stream.copies)
            )
            for stream in planned.streams[version]
        ]
    return KernelPlan(planned.interfaces, tuple(copies), tuple(streams)) if copies else NO_COPIES


def _within_bounds(served: list[Served], version: int) -> tuple[list[Served], dict[str, str]]:
    """Return who can be served within the bounds of a plan, and the reasons of those who can't, by name."""
    prefixes = {place: each.copy.prefixes for place, each in enumerate(served) if each.copy.prefixes}
    try:
        sets = {places for _, places in divide(prefixes, 32 if version == 4 else 128, MAX_RENDERED // 2)}
    except TooManyError:
        dropped = {each.client.name: OVERLAPPING for each in served if each.copy.prefixes}
    else:
        if _count_shared(served, sets) <= MAX_SHARED // 2:
            return served, {}
        dropped = {each.client.name: GROUPS for each in served if each.copy.share}
    return [each for each in served if each.client.name not in dropped], dropped


def _drop_beyond_size(found: dict[int, list[Served]]) -> dict[str, str]:
    """Keep who fits into a plan, in order; return the reasons of the others, by name."""
    dropped: dict[str, str] = {}
    room, left = MAX_COPIES, COPIES_BYTES
    for version, served in found.items():
        found[version] = []
        for each in served:
            size = COPY_BYTES + len(each.copy.share) + PREFIX_BYTES * len(each.copy.prefixes)
            size += INDEX_BYTES * len(each.streams)
            if room and size <= left:
                room, left = room - 1, left - size
                found[version].append(each)
            else:
                dropped[each.client.name] = LARGE
    return dropped


def _count_shared(served: list[Served], sets: Iterable[frozenset[int]]) -> int:
    general = [each.copy for each in served if not each.copy.prefixes]
    return count_shared([general, *([served[place].copy for place in sorted(places)] for places in sets)])


def _seen(left: Iterable[Client], served: Mapping[int, list[Served]], version: int, facts: Facts) -> set[str]:
    """Return the streams of which datagrams of this IP version have to go up, for a collector that a sender serves.

    One that the kernel serves is served in its own version; copies from the exporter's address have no other.
    """
    others = [each.client for each in served[10 - version] if each.client.source == "relay"]
    needing = [client for client in left if client.source == "relay" or _version(client.address) == version]
    return {stream for stream in facts.listeners if any(client.wants(stream) for client in (*needing, *others))}


def _streams(
    served: list[Served],
    version: int,
    listeners: Mapping[str, tuple[Listener, ...]],
    facts: Facts,
    counter_of: Callable[[str], int],
    unseen: Collection[str],
) -> tuple[StreamCopies, ...]:
    """Return the copies of each stream that has any, of collectors of one IP version."""
    arriving = min(MAX_LENGTH, max(facts.interfaces.values(), default=0))
    found = []
    for name, places in listeners.items():
        copies = tuple(place for place, each in enumerate(served) if name in each.streams)
        if copies:
            leaving = min(served[place].mtu for place in copies)
            longest = leaving if leaving < arriving else 0
            counter = counter_of(f"{'unseen' if name in unseen else 'stream'}/{name}/{version}")
            found.append(StreamCopies(name, 1, counter, places, copies, longest, name in unseen))
    return tuple(found)
