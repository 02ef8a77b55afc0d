"""The plan that the planner hands to the applier: copies in the terms of frames, typed and bounded. No I/O.

It has no word for a table, a hook or an instruction: the applier alone knows which rules it makes of a plan.
"""

from collections.abc import Iterable
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from shared.datagrams.limits import BUCKETS

MAX_REQUEST: Final = 16 << 20
"""Bytes of a plan, packed, as the applier takes it: 10,000 copies with 20 prefixes each."""
MAX_COPIES: Final = 10_000
"""As many as the registry may have clients."""
MAX_STREAMS: Final = 1024
MAX_LISTENERS: Final = 1024
"""Addresses and ports of one stream: a listener of all addresses has one for each of this host's."""
MAX_INTERFACES: Final = 64
MAX_SHARED: Final = 256 * BUCKETS
"""Buckets in the maps of one stream: each takes some 100 bytes in the kernel."""
MAX_PREFIXES: Final = 256
"""`shared.client.Prefixes`."""

Address = Annotated[bytes, Meta(min_length=4, max_length=16)]
"""4 bytes for IPv4, 16 for IPv6."""
Port = Annotated[int, Meta(ge=1, le=65_535)]
Mac = Annotated[bytes, Meta(min_length=6, max_length=6)]
Index = Annotated[int, Meta(ge=0, lt=MAX_COPIES)]


class Prefix(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """A network of sources."""

    address: Address
    length: Annotated[int, Meta(ge=0, le=128)]


class Copy(msgspec.Struct, array_like=True, frozen=True):
    """A collector's copies: their way, their headers, and the sources they are of.

    `link_index`, `next_hop` and `link_address`: the link that they leave by, the MAC address there and the link's own.
    `source` and `source_port` are those of a relay's copies; empty and 0: the exporter's own. `counter` counts them.
    `share` has the buckets of sources that a member of a group takes, a bit for each; empty: all.
    """

    name: Annotated[str, Meta(max_length=255)]
    counter: Annotated[int, Meta(ge=0, le=(1 << 31) - 1)]
    link_index: Annotated[int, Meta(ge=1, le=(1 << 31) - 1)]
    next_hop: Mac
    link_address: Mac
    address: Address
    port: Port
    source: Annotated[bytes, Meta(max_length=16)] = b""
    source_port: Annotated[int, Meta(ge=0, le=65_535)] = 0
    hop_limit: Annotated[int, Meta(ge=1, le=255)] = 64
    dscp: Annotated[int, Meta(ge=0, le=63)] = 0
    prefixes: Annotated[tuple[Prefix, ...], Meta(max_length=MAX_PREFIXES)] = ()
    sample: Annotated[int, Meta(ge=1, le=1_000_000)] = 1
    share: Annotated[bytes, Meta(max_length=BUCKETS // 8)] = b""


class Listener(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """An address and port at which datagrams of a stream arrive."""

    address: Address
    port: Port


class StreamCopies(msgspec.Struct, array_like=True, frozen=True):
    """The copies of a stream's datagrams of one IP version, by their places in the plan's list.

    Datagrams of more than `longest` bytes, IP header and all, are left alone; 0: there are none. What was copied is
    marked with `generation`, and counted by `counter`; if it is `unseen`, it ends there instead.
    """

    name: Annotated[str, Meta(max_length=64)]
    generation: Annotated[int, Meta(ge=1, le=0xFFFF)]
    counter: Annotated[int, Meta(ge=0, le=(1 << 31) - 1)]
    listeners: Annotated[tuple[Listener, ...], Meta(min_length=1, max_length=MAX_LISTENERS)]
    copies: Annotated[tuple[Index, ...], Meta(max_length=MAX_COPIES)]
    longest: Annotated[int, Meta(ge=0, le=65_535)] = 0
    unseen: bool = False


class KernelPlan(msgspec.Struct, array_like=True, frozen=True):
    """All copies that the kernel is to make, of what arrives by `interfaces`; without any of them, none."""

    interfaces: Annotated[
        tuple[Annotated[str, Meta(min_length=1, max_length=15)], ...], Meta(max_length=MAX_INTERFACES)
    ]
    copies: Annotated[tuple[Copy, ...], Meta(max_length=MAX_COPIES)]
    streams: Annotated[tuple[StreamCopies, ...], Meta(max_length=MAX_STREAMS)]


NO_COPIES: Final = KernelPlan((), (), ())


def buckets_of(share: bytes) -> list[int]:
    """Return the numbers of the buckets in a share.

    >>> buckets_of(bytes([0b10100000, 1]))
    [0, 2, 15]
    """
    bits = int.from_bytes(share)
    last = 8 * len(share) - 1
    return [bucket for bucket in range(last + 1) if bits >> last - bucket & 1]


def teams_of(copies: Iterable[Copy]) -> list[list[Copy]]:
    """Return the copies with a share, those together of which no two take the same bucket: members of a group."""
    teams: list[tuple[int, list[Copy]]] = []
    for copy in copies:
        share = int.from_bytes(copy.share)
        place = next((place for place, (taken, _) in enumerate(teams) if not taken & share), len(teams))
        if share:
            taken, team = teams[place] if place < len(teams) else (0, [])
            teams[place:] = [(taken | share, [*team, copy]), *teams[place + 1 :]]
    return [team for _, team in teams]


def count_shared(copies: Iterable[Iterable[Copy]]) -> int:
    """Return how many buckets the maps of these chains have: each team has one, wherever it is."""
    teams = {tuple(team) for some in copies for team in teams_of(some)}
    return sum(int.from_bytes(copy.share).bit_count() for team in teams for copy in team)
