"""Every message on the bus: its kind and version, encoded to parts and decoded from parts.

A message is multipart: the topic, an envelope, a body, and for datagrams two arrays (rows, payload). Envelope and body
are msgpack, each message kind one Struct below. The envelope decides: its first two fields are version and kind,
and a receiver that knows neither counts the message and drops it without reading on.

Decoding never raises anything but `MessageError`, whatever the bytes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Final

import msgspec
import numpy as np
from msgspec import Meta

from shared.client import Client, Source, Trouble
from shared.datagrams.batch import MAX_DATAGRAM, ROW, DatagramBatch

VERSION: Final = 1
MAX_MESSAGE: Final = 1024 * 1024
"""Bytes a part may have; libzmq disconnects a peer that sends more (ZMQ_MAXMSGSIZE)."""
MAX_TOPIC: Final = 512
MAX_ENVELOPE: Final = 512
"""Bytes: names in topics and envelopes are short; anything longer is not ours."""
PIECE_SIZE: Final = 256 * 1024
"""Bytes of body at which a list is cut into pieces: far enough from `MAX_MESSAGE` that no entry can reach it."""

Part = bytes | memoryview
MAX_NUMBER: Final = 1 << 62
"""Far enough below 2**64, the end of msgpack's integers, that what a receiver adds to a number can be sent again."""
SENDER: Final = r"^[a-z]+\.[0-9]{1,9}$"
"""A service and its number, as in `ingest.2`."""
REPLY_PREFIX: Final = "reply/"
ReplyTopic = Annotated[str, Meta(max_length=128, pattern=f"^{REPLY_PREFIX}.*/$")]
MAX_INTERFACE: Final = 15
"""IFNAMSIZ less its final zero (netdevice(7))."""
MAX_FRAME: Final = 65_536 + 18
"""Bytes: the largest MTU there is (loopback's), an Ethernet header with a VLAN tag."""
MAX_FRAMES: Final = 1_000_000
MAX_NAME: Final = 255
"""Characters of a client's name, which has as many bytes at most."""
MAX_PIECES: Final = 4096
"""Of a list of collectors: as many as there may be, each with the longest name, fit into fewer."""
StreamName = Annotated[str, Meta(pattern="^[^/]{1,64}$")]
"""Without a `/`: who subscribes to a stream gets no other, such as `messages/more`, of which there is no end."""
Number = Annotated[int, Meta(ge=0, le=MAX_NUMBER)]


class MessageError(ValueError):
    """A message that can't be taken; `cause` is the word it is counted under."""

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(message)
        self.cause = cause


class Envelope(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """What every message begins with.

    `boot` is drawn at a sender's start, so a restart is not mistaken for a loss. `sequence` counts the sender's
    messages on this topic and `total` the datagrams it has published there before this message.
    """

    version: int
    kind: str
    sender: Annotated[str, Meta(pattern=SENDER)]
    boot: Number
    sequence: Number
    total: Number


class Datagrams(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """A `DatagramBatch`; rows and payload follow as arrays. Without rows it is a mark: the sequence starts here.

    With a `chunk` the payload is not in the message, but lent by the sender there (`shared.bus.loans`). `loan` is the
    number of that loan, otherwise of the last one before. Each datagram is at a multiple of `stride` if there is one.
    """

    stream: StreamName
    received_ns: int
    loan: Number = 0
    chunk: Number | None = None
    stride: Annotated[int, Meta(ge=0, le=MAX_DATAGRAM)] = 0


class RegistrySnapshot(msgspec.Struct, array_like=True, frozen=True):
    """One of `pieces` pieces of the whole registry at `revision`."""

    revision: Number
    piece: int
    pieces: int
    clients: list[Client]


class RegistryChange(msgspec.Struct, array_like=True, frozen=True):
    """What turned the registry at revision `after` into that at `revision`."""

    after: Number
    revision: Number
    joined: list[Client]
    left: list[str]


class ServeRequest(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Asks who sends copies to say on topic `reply` when it serves the registry as of `revision`."""

    id: int
    reply: ReplyTopic
    revision: int


class ServeReply(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """The answer to a `ServeRequest`: copies flow to every collector of `revision` that is for this sender."""

    id: int
    revision: int


class TransmitRequest(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Asks the transmitter to put `frame` on an interface byte for byte, and to answer on topic `reply`.

    `frame` is all of it: destination, source, ethertype, payload and whatever checksum of its own it carries. With
    `own_fcs` its last four bytes are the frame check sequence, which the driver then leaves out (SO_NOFCS, socket(7)).
    It goes out `count` times, `per_second` times a second; 0: one after the other.
    """

    id: int
    reply: ReplyTopic
    interface: Annotated[str, Meta(min_length=1, max_length=MAX_INTERFACE)]
    frame: Annotated[bytes, Meta(max_length=MAX_FRAME)]
    count: Annotated[int, Meta(ge=1, le=MAX_FRAMES)] = 1
    per_second: Annotated[float, Meta(ge=0, le=1_000_000)] = 0.0
    own_fcs: bool = False


class TransmitReply(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """How many frames of a `TransmitRequest` have left, and when that is not all, why.

    `error` is a word of the JSON protocol: `bad_request`, `not_permitted` or `unavailable`; empty when all have left.
    """

    id: int
    sent: Number
    error: str = ""
    message: str = ""


class Status(msgspec.Struct, array_like=True, frozen=True):
    """One of `pieces` pieces of a service's accounts, numbered `report`; see `shared.ledger` for what is in them."""

    service: str
    pid: int
    started_ns: int
    report: int
    piece: int
    pieces: int
    accounts: dict[str, dict[str, Annotated[int, Meta(le=MAX_NUMBER)]]]


class Troubled(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """A collector that has a trouble, since `age_ms` before the message was made, and datagrams lost by it so far."""

    name: Annotated[str, Meta(min_length=1, max_length=MAX_NAME)]
    generation: Number
    trouble: Trouble
    age_ms: Number
    count: Number


class Health(msgspec.Struct, array_like=True, frozen=True):
    """One of `pieces` pieces of a list, numbered `report`: of all collectors of `source`, those that have a trouble."""

    source: Source
    report: Number
    piece: Annotated[int, Meta(ge=0, lt=MAX_PIECES)]
    pieces: Annotated[int, Meta(ge=1, le=MAX_PIECES)]
    troubled: list[Troubled]


Body = (
    Datagrams
    | RegistrySnapshot
    | RegistryChange
    | ServeRequest
    | ServeReply
    | TransmitRequest
    | TransmitReply
    | Status
    | Health
)

KINDS: Final[dict[str, type[Body]]] = {
    "datagrams": Datagrams,
    "registry.snapshot": RegistrySnapshot,
    "registry.change": RegistryChange,
    "serve.request": ServeRequest,
    "serve.reply": ServeReply,
    "transmit.request": TransmitRequest,
    "transmit.reply": TransmitReply,
    "status": Status,
    "health": Health,
}
_NAMES: Final = {struct: kind for kind, struct in KINDS.items()}
_encoder: Final = msgspec.msgpack.Encoder()
_envelopes: Final = msgspec.msgpack.Decoder(Envelope)
_bodies: Final = {kind: msgspec.msgpack.Decoder(struct) for kind, struct in KINDS.items()}


@dataclass(frozen=True, slots=True)
class Message:
    """A message taken from the bus; `batch` is there when the body is `Datagrams`."""

    topic: str
    envelope: Envelope
    body: Body
    batch: DatagramBatch | None = None


def datagrams_topic(stream: str) -> str:
    """The topic of a stream's batches. Ends in `/`, since ZeroMQ matches by prefix."""
    return f"datagrams/{stream}/"


def inline_topic(stream: str) -> str:
    """Who subscribes to it can't borrow, and needs the stream's payloads in the messages themselves."""
    return f"inline/{stream}/"


def status_topic(service: str) -> str:
    """The topic of a service's status, as in `status/ingest.1/`."""
    return f"status/{service}/"


def serve_topic(source: Source) -> str:
    """The topic on which those who send a kind of copies are asked whether they do; none subscribes who could not."""
    return f"serve/{source}/"


def health_topic(source: Source) -> str:
    """The topic on which it is told how collectors of a source do; each begins with `HEALTH_PREFIX`."""
    return f"{HEALTH_PREFIX}{source}/"


def home(kind: str) -> str:
    """What the topics of a kind begin with: what may be published on a topic must not pass for another kind there.

    >>> home("registry.change"), home("serve.reply")
    ('registry/', 'reply/')
    """
    family, _, rest = kind.partition(".")
    return REPLY_PREFIX if rest == "reply" else f"{family}/"


def peek(parts: Sequence[Part]) -> tuple[str, Envelope]:
    """Return topic and envelope of a message, of any version, without reading on. MessageError when it has none."""
    try:
        if not 3 <= len(parts) <= 5:
            raise MessageError("malformed", f"{len(parts)} parts")
        if len(parts[0]) > MAX_TOPIC or len(parts[1]) > MAX_ENVELOPE:
            raise MessageError("malformed", f"topic of {len(parts[0])} and envelope of {len(parts[1])} bytes")
        return str(parts[0], "utf-8"), _envelopes.decode(parts[1])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise MessageError("malformed", f"{type(error).__name__}: {error}") from None


HEALTH_PREFIX: Final = "health/"
REGISTRY_TOPIC: Final = "registry/"
TRANSMIT_TOPIC: Final = "transmit/"


def encode(
    topic: str, body: Body, *, sender: str, boot: int, sequence: int, total: int, batch: DatagramBatch | None = None
) -> list[Part]:
    """Return the parts of a message. The arrays are the batch's own buffers, not copies; a lent payload is left out."""
    envelope = Envelope(VERSION, _NAMES[type(body)], sender, boot, sequence, total)
    parts: list[Part] = [topic.encode(), _encoder.encode(envelope), _encoder.encode(body)]
    if batch is not None:
        parts.append(batch.rows.tobytes())
    if batch is not None and not (isinstance(body, Datagrams) and body.chunk is not None):
        parts.append(batch.payload)
    return parts


Borrow = Callable[[Envelope, Datagrams, int], Part]
"""Finds a lent payload of so many bytes; MessageError when it can't be had."""


def borrow_nothing(_envelope: Envelope, _body: Datagrams, _size: int) -> Part:
    """For who reads only what is in the messages."""
    raise MessageError("not_borrowed", "the payload is lent, and this reader does not borrow")


def decode(parts: Sequence[Part], borrow: Borrow = borrow_nothing) -> Message:
    """Return the message in `parts`; a batch's columns are read-only views of them. MessageError when it is not one."""
    try:
        return _decode(parts, borrow)
    except MessageError:
        raise
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:  # RecursionError: nesting thousands deep
        raise MessageError("malformed", f"{type(error).__name__}: {error}") from None


def _decode(parts: Sequence[Part], borrow: Borrow) -> Message:
    topic, envelope = peek(parts)
    if envelope.version != VERSION:
        raise MessageError("bad_version", f"version {envelope.version}, this is {VERSION}")
    if envelope.kind not in KINDS:
        raise MessageError("unknown_kind", f"kind {envelope.kind[:40]!r}")
    body = _bodies[envelope.kind].decode(parts[2])
    if not isinstance(body, Datagrams):
        if isinstance(body, Status) and body.service != envelope.sender:
            raise MessageError("malformed", f"status of {body.service[:40]!r} from {envelope.sender}")
        if len(parts) != 3:
            raise MessageError("malformed", f"{envelope.kind} with {len(parts)} parts")
        return Message(topic, envelope, body)
    if topic != datagrams_topic(body.stream):
        raise MessageError("malformed", f"datagrams of stream {body.stream[:40]!r} on topic {topic[:40]!r}")
    lent = body.chunk is not None
    if len(parts) != (4 if lent else 5):
        raise MessageError("malformed", f"datagrams with {len(parts)} parts")
    rows = np.frombuffer(parts[3], ROW)
    payload = (
        borrow(envelope, body, body.stride * len(rows) or int(rows["length"].sum(dtype=np.int64))) if lent else parts[4]
    )
    batch = DatagramBatch(body.stream, body.received_ns, rows, payload, body.stride)
    batch.check()
    return Message(topic, envelope, body, batch)
