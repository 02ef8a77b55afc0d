"""A client of the registry: the copies it asked for, declared once, and its entry on the bus and in JSON."""

from operator import attrgetter
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from shared.net.addresses import pack_address, pack_network

Source = Literal["relay", "original"]
Trouble = Literal["unreachable", "refusing", "slow"]
"""Troubles of a collector, gravest first; the first that it has is reported."""
HopLimit = Annotated[int, Meta(ge=1, le=255)]
Dscp = Annotated[int, Meta(ge=0, le=63)]
Generation = Annotated[int, Meta(ge=0, le=1 << 62)]
"""Within the bus's limit for numbers, `shared.bus.bodies.fields.MAX_NUMBER`."""
Streams = Annotated[tuple[str, ...], Meta(max_length=64)]
"""Streams of one client; with 64 prefixes beside them, 56 of the largest clients that sign up fit a bus message."""
Prefixes = Annotated[tuple[str, ...], Meta(max_length=256)]
"""Prefixes of one client, limited since readers check each: 56 of the largest clients fit a bus message."""
PLAIN: Final = r"^[^\x00-\x1f\x7f-\x9f]*\Z"
"""Text without control characters: terminals, logs and pages show it."""
MAX_GROUP: Final = 64
Group = Annotated[
    str,
    Meta(max_length=MAX_GROUP, pattern=PLAIN, description=f"up to {MAX_GROUP} characters, without control characters"),
]
ALL_STREAMS = "*"
MAX_PLACES: Final = 64
"""Workers, each at each stream, whose place is known of one collector; the rest begin by time."""
MAX_REASON: Final = 200
"""Characters of the reason for withholding."""
MOST_WAITING: Final[dict[Source, int]] = {"relay": 65_536, "original": 4096}
"""Datagrams, however small, that may wait for one collector: for room in its send buffer, or for its next hop."""
CHALLENGE_PREFIX: Final = b"fanwire-challenge "
"""Begins the datagram that asks the host at an address to prove it; the nonce follows."""


class _Named(msgspec.Struct, frozen=True):
    name: str


class CopyTerms(_Named, frozen=True, kw_only=True):
    """A client's name and the copies it asks for: the fields that the bus, JSON and settings have in common.

    `prefixes` are CIDR texts; `sample` is the N of 1-in-N; members of one `group` share a stream by hash of source
    address. `hop_limit` (IPv4: time to live) and `dscp` are those of every copy.
    """

    streams: Streams = ()
    source: Source = "relay"
    prefixes: Prefixes = ()
    sample: Annotated[int, Meta(ge=1, le=1_000_000)] = 1
    group: str = ""
    hop_limit: HopLimit = 64
    dscp: Dscp = 0

    def wants(self, stream: str) -> bool:
        """Return whether copies of `stream` go to this client."""
        return stream in self.streams or ALL_STREAMS in self.streams

    @property
    def terms(self) -> dict[str, Any]:
        """The fields above by name, to make another of the structs that have them."""
        return dict(zip(CopyTerms.__struct_fields__, _get_terms(self), strict=True))


_get_terms: Final = attrgetter(*CopyTerms.__struct_fields__)


class WrittenTerms(CopyTerms, frozen=True, kw_only=True):
    """The same, as JSON and settings spell them: there `prefixes` is called `from`."""

    prefixes: Prefixes = msgspec.field(default=(), name="from")


class AskedTerms(WrittenTerms, frozen=True, kw_only=True):
    """The same, as a request or the settings may have them: a list may have groups of a release that took any."""

    group: Group = ""


DEFAULT_TERMS: Final = WrittenTerms("")
"""The terms of a client that asks for nothing in particular."""


class Withheld(msgspec.Struct, frozen=True):
    """An admin's order to send a collector nothing: the holder of the token that gave it, its Unix time, its reason.

    `by` is empty for an admin on this host without a token.
    """

    by: Annotated[str, Meta(max_length=255)]
    since: float
    reason: Annotated[str, Meta(max_length=MAX_REASON)] = ""


class Place(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """The place that a collector has reached in what a worker published on a stream since its boot.

    `total` datagrams are behind it, and `sequence` is the number of the message that comes next; `received_ns` is the
    time of the last one. Of those before, it has not had `lacked`, and nobody knows which ones.
    """

    stream: str
    worker: Annotated[str, Meta(pattern=r"^[a-z]+\.[0-9]{1,9}\Z")]
    boot: Generation
    sequence: Generation
    total: Generation
    received_ns: Generation = 0
    lacked: Generation = 0


Places = Annotated[tuple[Place, ...], Meta(max_length=MAX_PLACES)]


class Resume(msgspec.Struct, frozen=True, omit_defaults=True):
    """The past that a collector is to have of these streams before live copies of them; without any, of all.

    Of a worker in `places` it gets what comes behind; of others what was received at `since_ns` or later. If the sender
    of its copies has served the name under `generation`, it knows better where it has left. What was received before
    `twice_until_ns` another node may have sent already.
    """

    since_ns: Generation
    generation: Generation = 0
    places: Places = ()
    streams: Streams = ()
    twice_until_ns: Generation = 0


class Client(CopyTerms, frozen=True, omit_defaults=True):
    """One entry on the bus. With `streams` it is a collector and gets copies at `address`, `port`; else it is a name.

    `generation` never repeats, so a late `renew` or `leave` can't touch a successor of the same name. A collector that
    is `withheld` gets no copies until an admin releases it. One that has to `resume` gets the past first. One with
    `catch_up` gets from the journal whatever it would otherwise miss. With `node` only that node of a cluster reaches
    it.
    """

    generation: Generation
    address: str
    port: Annotated[int, Meta(ge=0, le=65_535)]
    withheld: Withheld | None = None
    catch_up: bool = False
    resume: Resume | None = None
    node: str = ""

    @property
    def socket_address(self) -> tuple[str, int]:
        """The address and port that copies go to."""
        return self.address, self.port

    def __post_init__(self) -> None:
        if self.streams:  # the senders of copies rely on it
            pack_address(self.address)
        for prefix in self.prefixes:
            pack_network(prefix)


class ListedClient(WrittenTerms, frozen=True):
    """One entry in JSON, as the gateway shows it and its clients read it."""

    address: str
    port: int
