"""Requests of clients as typed messages, their limits, and the refusal that answers them. No I/O."""

from dataclasses import dataclass
from typing import Annotated, Final, Literal

from msgspec import Meta, Struct, field

from shared.bus.bodies.fields import Number
from shared.bus.frame_requests import check_frame, make_frame, parse_hex, parse_mac, sending_seconds
from shared.bus.messages import MAX_FRAMES, MAX_INTERFACE
from shared.client import MAX_GROUP, MAX_REASON, PLAIN, AskedTerms
from shared.settings.values import Ethertype, Port, parse_ethertype

MAX_ITEMS: Final = 64
"""Streams or prefixes in one `register`; keeps an entry so small that 56 of them fit a bus message."""
YEAR_SECONDS: Final = 31_536_000
MAX_WAITING_SECONDS: Final = 60.0
"""Time that the frames of one request may take at their pace: its connection waits for the answer meanwhile."""

ErrorWord = Literal[
    "bad_request", "bad_name", "name_taken", "stale_generation", "unknown_stream", "unproven_address", "address_taken",
    "loop",    "not_permitted", "registry_full", "no_transmitter", "unavailable", "too_long", "too_slow",
]  # fmt: skip
Id = Annotated[str, Meta(max_length=128)] | Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
"""Values of `id`; an answer must be able to carry them back."""


class RequestError(Exception):
    """A refusal: answered with its stable word and a sentence, and counted; `closes` also ends the connection."""

    def __init__(
        self,
        error: ErrorWord,
        message: str,
        *,
        id: Id | None = None,
        closes: bool = False,
        cross_protocol: bool = False,
    ) -> None:
        super().__init__(message)
        self.error = error
        self.id = id
        self.closes = closes
        self.cross_protocol = cross_protocol


def no_transmitter() -> RequestError:
    """Return the refusal of a request that needs raw sockets, while no transmitter has them."""
    return RequestError(
        "no_transmitter",
        "no running transmitter has raw sockets; its log and `fanwire doctor` say what it lacks",
    )


@dataclass(frozen=True, slots=True)
class SignUp:
    """Signs up by the documented names protocol, and asks for the list."""

    name: str


class _Request(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="op"):
    id: Id | None = None


class Register(AskedTerms, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="op", tag="register"):
    """Signs up under a name; with `streams` as a collector. Without `address`, copies go to the client's own."""

    prefixes: Annotated[tuple[Annotated[str, Meta(max_length=64)], ...], Meta(max_length=MAX_ITEMS)] = field(
        default=(), name="from"
    )
    id: Id | None = None
    address: Annotated[str, Meta(max_length=64)] | None = None
    port: Port | None = None
    ttl: Annotated[float, Meta(ge=0, le=YEAR_SECONDS)] = 0.0
    hold: bool = False
    take_over: bool = False
    since: Annotated[float, Meta(ge=0, le=YEAR_SECONDS)] | Annotated[str, Meta(max_length=64)] | None = None


class Renew(_Request, frozen=True, tag="renew"):
    """Restarts the time of an entry's lease."""

    name: str
    generation: Number


class Leave(_Request, frozen=True, tag="leave"):
    """Removes an entry."""

    name: str
    generation: Number


class Withhold(_Request, frozen=True, tag="withhold"):
    """Stops the copies to a collector, and to any later one of its name. The entry stays."""

    name: str
    reason: Annotated[str, Meta(max_length=MAX_REASON, pattern=PLAIN)] = ""


class Release(_Request, frozen=True, tag="release"):
    """Lets a collector have its copies again."""

    name: str


class ListClients(_Request, frozen=True, tag="list"):
    """Asks for every entry in full."""


class WatchClients(_Request, frozen=True, tag="watch"):
    """Asks for every entry, then for each change; with a known `revision` and `epoch`, only for changes since then."""

    revision: Number | None = None
    epoch: Annotated[str, Meta(max_length=64)] | None = None


class Confirm(_Request, frozen=True, tag="confirm"):
    """Proves that copies arrive at an address: `nonce` came there in a datagram, after a `register` of `name`."""

    name: str
    nonce: Annotated[str, Meta(max_length=64)]


class Auth(_Request, frozen=True, tag="auth"):
    """Shows the client's token."""

    token: str


class ListStreams(_Request, frozen=True, tag="streams"):
    """Asks for the streams of which copies can be had."""


class Octets(bytes):
    """Bytes, which JSON spells in hexadecimal digits."""


class Mac(Octets):
    """A MAC address: six bytes."""


class Transmit(_Request, frozen=True, tag="transmit"):
    """Sends a frame by an interface: `frame` is the whole frame, or `destination` to `checksum` are its parts."""

    interface: Annotated[str, Meta(min_length=1, max_length=MAX_INTERFACE)]
    frame: Octets | None = None
    destination: Mac | None = None
    source: Mac | None = None
    ethertype: Ethertype | None = None
    payload: Octets | None = None
    checksum: Octets | None = None
    count: Annotated[int, Meta(ge=1, le=MAX_FRAMES)] = 1
    per_second: Annotated[float, Meta(ge=0, le=1_000_000)] = 0.0
    own_fcs: bool = False

    def __post_init__(self) -> None:
        if self.seconds > MAX_WAITING_SECONDS:
            takes = f"{self.count} frames take {self.seconds:.0f} s at that pace"
            raise ValueError(f"count: {takes}; expected at most {MAX_WAITING_SECONDS:g} s")
        _ = self.whole  # raises for parts that make no frame

    @property
    def seconds(self) -> float:
        """Seconds that the frames take at their pace."""
        return sending_seconds(self.count, self.per_second)

    @property
    def whole(self) -> bytes:
        """The frame byte for byte."""
        parts = {name: getattr(self, name) for name in ("destination", "source", "ethertype", "payload")}
        if self.frame is not None:
            if any(part is not None for part in (*parts.values(), self.checksum)):
                raise ValueError("frame: expected either the whole frame, or its parts")
            return bytes(check_frame(self.frame, own_fcs=self.own_fcs))
        for name, part in parts.items():
            if part is None:
                raise ValueError(f"{name} is missing: expected {FRAME_EXPECTED[name]}")
        parts["ethertype"] = parse_ethertype(parts["ethertype"])
        return make_frame(**parts, checksum=self.checksum or b"", own_fcs=self.own_fcs)


def parse_octets(kind: type, value: object) -> Octets:
    """Parse the JSON of a field of one of these kinds, as msgspec's `dec_hook`. ValueError when it is none."""
    if not isinstance(value, str):
        raise ValueError("not a string")
    return Mac(parse_mac(value)) if kind is Mac else Octets(parse_hex(value))


Operation = (
    Auth | Register | Renew | Leave | Withhold | Release | ListClients | WatchClients | Confirm | ListStreams | Transmit
)
Request = SignUp | Operation

OPERATIONS: Final = (
    *("auth", "register", "renew", "leave", "withhold", "release"),
    *("list", "watch", "confirm", "streams", "transmit"),
)
EXPECTED: Final = {
    "id": "a string of at most 128 characters or a whole number of 64 bits",
    "name": "a string",
    "token": "the token that `fanwire token` printed, as a string",
    "generation": "the whole number that `register` answered",
    "revision": "the whole number that `list`, `watch` or an event showed",
    "epoch": "the text that `list` or `watch` showed with the revision",
    "reason": f"a string of at most {MAX_REASON} characters, without control characters",
    "nonce": "the text after `fanwire-challenge ` in the datagram",
    "streams": f"a list of at most {MAX_ITEMS} stream names",
    "port": "a whole number from 1 to 65535",
    "address": "an IP address as a string",
    "source": '"relay" or "original"',
    "from": f'a list of at most {MAX_ITEMS} prefixes such as "192.0.2.0/24"',
    "sample": "a whole number from 1 to 1000000",
    "group": f"a string of at most {MAX_GROUP} characters, without control characters",
    "hop_limit": "a whole number from 1 to 255",
    "dscp": "a whole number from 0 to 63",
    "ttl": f"seconds from 0 to {YEAR_SECONDS}",
    "hold": "true or false",
    "take_over": "true or false",
    "since": 'seconds ago, a time such as "2026-11-30T03:12:00Z", or "left"',
}
_HEX: Final = "hexadecimal digits, two a byte"
_MAC: Final = "a MAC address such as 01:02:03:04:05:06"
FRAME_EXPECTED: Final = {
    "interface": f"the name of an interface, at most {MAX_INTERFACE} characters",
    "frame": _HEX,
    "destination": _MAC,
    "source": _MAC,
    "ethertype": 'a number or its text, such as "0x0801"',
    "payload": _HEX,
    "checksum": _HEX,
    "count": f"a whole number from 1 to {MAX_FRAMES}",
    "per_second": "frames a second up to 1000000, or 0: at once",
    "own_fcs": "true or false",
}
"""Fields of `transmit`; its `source` is a MAC address, unlike that of `register`."""
