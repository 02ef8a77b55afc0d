"""The entries of lists, `[[stream]]`, `[[collector]]` and `[[token]]`: each setting's type, default and constraints."""

from functools import partial
from typing import Annotated, Final, Literal

from msgspec import Meta, Struct

from shared.client import ALL_STREAMS, PLAIN, AskedTerms
from shared.net.addresses import Endpoint, check_host, is_host_name, pack_network, parse_endpoint
from shared.settings.values import Bytes, Name, Port, Scope, check_each

MAX_NAME: Final = 255
"""Bytes of a client's name."""
STREAM_SCHEMES: Final = ("udp", "tcp", "unixgram")

Protocol = Literal["netflow", "ipfix", "sflow"]
"""NetFlow v5 and v9, IPFIX, or sFlow v5: their numbers tell what was lost before it came."""


class Stream(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Datagrams under one name, from any number of listeners."""

    name: Name
    listen: tuple[str, ...]
    """udp://HOST:PORT, tcp://HOST:PORT or unixgram:///PATH; a multicast group with its interface behind %.
    Empty where the stream comes from other sites alone."""
    reply: Annotated[str, Meta(max_length=1024)] | None = None
    """Sent back to the sender of every UDP datagram; none by default."""
    reply_beyond_loopback: bool = False
    """Without it a reply is refused on a listener that is not loopback: forged sources would aim it at others."""
    receive_buffer: Bytes = 33_554_432
    """Bytes asked of the kernel for each UDP socket."""
    trains: bool = False
    """Lets the kernel hand over datagrams that come right behind each other as one piece; a dropped one counts once."""
    protocol: Protocol | None = None
    """Protocol of its UDP listeners, to count what is missing from the exporters' own numbers; none: nothing is
    counted."""
    journal: bool = False
    """Keep its datagrams in the journal."""
    offload: bool = True
    """Let the kernel copy what it can; else one sender makes all copies of a collector, and none overtakes another."""

    def __post_init__(self) -> None:
        check_each("listen", partial(parse_endpoint, schemes=STREAM_SCHEMES), self.listen)

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        """`listen`, parsed."""
        return tuple(parse_endpoint(text, STREAM_SCHEMES) for text in self.listen)


class Collector(AskedTerms, frozen=True, forbid_unknown_fields=True):
    """A collector that can't sign itself up; the fields of `register`."""

    name: Annotated[
        str, Meta(min_length=1, pattern=PLAIN, description=f"1 to {MAX_NAME} bytes, without control characters")
    ]
    streams: Annotated[tuple[str, ...], Meta(min_length=1, max_length=64)]
    address: str
    """An address, or a host name, which the gateway looks up every `[gateway] resolve_seconds`."""
    port: Port
    catch_up: bool = False
    """Gets later, from the journal, what it misses of streams that have one."""

    def __post_init__(self) -> None:
        if len(self.name.encode()) > MAX_NAME:
            raise ValueError(f"name: expected 1 to {MAX_NAME} bytes of UTF-8")
        check_each("address", check_host, [self.address])
        check_each("from", pack_network, self.prefixes)

    @property
    def host(self) -> str:
        """`address`, where it is a host name; else nothing."""
        return self.address if is_host_name(self.address) else ""


class Token(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A client that may use the gateway from elsewhere: known by the token it sends, or by the certificate it shows."""

    name: Name
    """The holder: entries belong to it, from whichever connection they were made."""
    hash: Annotated[str, Meta(pattern=r"^sha256:[0-9a-f]{64}\Z", description="as `fanwire token` prints it")] | None = (
        None
    )
    """SHA-256 of its token, as `fanwire token` prints it."""
    certificate: Annotated[str, Meta(min_length=1, max_length=64)] | None = None
    """The subject's common name in its certificate, which stays when the certificate is renewed."""
    scopes: Annotated[tuple[Scope, ...], Meta(min_length=1)]
    streams: Annotated[tuple[str, ...], Meta(min_length=1, max_length=64)] = (ALL_STREAMS,)
    """Streams that it may sign up for: no more than an entry has, which is narrowed to them."""
    destinations: tuple[str, ...] = ()
    """Networks to which it may have copies sent without proof."""

    def __post_init__(self) -> None:
        if (self.hash is None) == (self.certificate is None):
            raise ValueError("hash: expected this or certificate, and not both")
        check_each("destinations", pack_network, self.destinations)
