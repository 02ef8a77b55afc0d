"""The plan that the planner hands to the applier: copies in the terms of frames, typed and bounded. No I/O.

It has no word for a table, a hook or an instruction: the applier alone knows which rules it makes of a plan.
"""

from typing import Annotated, Final

import msgspec
from msgspec import Meta

MAX_COPIES: Final = 10_000
"""As many as the registry may have clients."""
MAX_STREAMS: Final = 1024
MAX_LISTENERS: Final = 1024
"""Addresses and ports of one stream: a listener of all addresses has one for each of this host's."""
MAX_INTERFACES: Final = 64
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
