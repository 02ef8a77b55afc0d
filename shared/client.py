"""A registry entry as processes hand it to each other, and the copy of the registry that a subscriber keeps."""

from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from shared.net.addresses import pack_address, pack_network

Source = Literal["relay", "original"]
Trouble = Literal["unreachable", "refusing", "slow"]
"""What can be wrong with a collector, gravest first: of several, the first is told."""
HopLimit = Annotated[int, Meta(ge=1, le=255)]
Dscp = Annotated[int, Meta(ge=0, le=63)]
Generation = Annotated[int, Meta(ge=0, le=1 << 62)]
"""As far as numbers on the bus go, see `shared.bus.messages.MAX_NUMBER`."""
Streams = Annotated[tuple[str, ...], Meta(max_length=64)]
Prefixes = Annotated[tuple[str, ...], Meta(max_length=256)]
"""Of one client. Bounded, since readers check each: 64 of the largest clients fit a bus message, and take no time."""
ALL_STREAMS = "*"
CHALLENGE_PREFIX: Final = b"fanwire-challenge "
"""Begins the datagram that asks whoever is at an address to prove it; the nonce follows."""


class Client(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One entry. With `streams` it is a collector and gets copies at `address`, `port`; without, a name on the list.

    `generation` never repeats, so a late `renew` or `leave` can't touch a successor of the same name. `prefixes` are
    CIDR texts (on the JSON side the field is called `from`); `sample` is the N of 1-in-N; members of one `group` share
    a stream by hash of source address. `hop_limit` (IPv4: time to live) and `dscp` are those of every copy.
    """

    name: str
    generation: Generation
    address: str
    port: Annotated[int, Meta(ge=0, le=65_535)]
    streams: Streams = ()
    source: Source = "relay"
    prefixes: Prefixes = ()
    sample: Annotated[int, Meta(ge=1, le=1_000_000)] = 1
    group: str = ""
    hop_limit: HopLimit = 64
    dscp: Dscp = 0

    def __post_init__(self) -> None:
        if self.streams:  # who sends copies relies on it
            pack_address(self.address)
        for prefix in self.prefixes:
            pack_network(prefix)

    def wants(self, stream: str) -> bool:
        """Whether copies of `stream` go to this client."""
        return stream in self.streams or ALL_STREAMS in self.streams
