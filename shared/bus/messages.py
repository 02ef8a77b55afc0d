"""Every message on the bus: its kind and version, encoded to parts and decoded from parts.

A message is multipart: the topic, an envelope, a body, and for datagrams two arrays (rows, payload). Envelope and body
are msgpack, each message kind one Struct below. The envelope decides: its first two fields are version and kind,
and a receiver that knows neither counts the message and drops it without reading on.

While a stack is upgraded, services of two neighbouring releases are on one bus. A field that is new stands behind those
of before, under the same version: each release passes over what it does not know. A new version is for messages that
the release before could not read; this one then reads those of the version before, too
(tests/shared/bus/recorded has them).

Decoding never raises anything but `MessageError`, whatever the bytes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Final

import msgspec
from msgspec import Meta

from shared.bus.bodies.exporters_message import Exporters
from shared.bus.bodies.fields import MAX_NUMBER, REPLAY_PREFIX, REPLY_PREFIX, Number, ReplyTopic, SenderName, StreamName
from shared.bus.bodies.health_message import Health
from shared.bus.bodies.journal_messages import CatchUpReport, JournalPortion, JournalRead, Replayed
from shared.bus.bodies.nodes_message import Nodes
from shared.bus.bodies.offload_messages import KernelCopies, MarkGeneration, OffloadPaths, OffloadReply
from shared.bus.bodies.packing import pack, pack_values, unpack
from shared.bus.bodies.template_messages import Renewals, Templates
from shared.client import Client, Source
from shared.datagrams.limits import MAX_DATAGRAM, MAX_ROWS

if TYPE_CHECKING:
    from shared.datagrams.batch import DatagramBatch

VERSION: Final = 1
MAX_MESSAGE: Final = 1024 * 1024
"""Bytes a part may have; libzmq disconnects a peer that sends more (ZMQ_MAXMSGSIZE)."""
FILLER: Final = b"\xc0"
"""The body of a message that only takes a place in the queues, behind a large one. It has that one's envelope."""
MAX_TOPIC: Final = 512
MAX_ENVELOPE: Final = 512
"""Bytes: names in topics and envelopes are short; anything longer is not fanwire's."""

Part = bytes | memoryview
MAX_INTERFACE: Final = 15
"""IFNAMSIZ less its final zero (netdevice(7))."""
MAX_FRAME: Final = 65_536 + 18
"""Bytes: the largest MTU there is (loopback's), an Ethernet header with a VLAN tag."""
MAX_FRAMES: Final = 1_000_000
PLAIN_FIELDS: Final = 5
"""Fields of `Datagrams` before `left`, which only an `Again` needs."""


class MessageError(ValueError):
    """A message that can't be used; `cause` is the word it is counted under."""

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(message)
        self.cause = cause


class Envelope(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """The part that every message begins with.

    `boot` is drawn at a sender's start, so a restart is not mistaken for a loss. `sequence` counts the sender's
    messages on this topic and `total` the datagrams it has published there before this message.
    """

    version: int
    kind: str
    sender: SenderName
    boot: Number
    sequence: Number
    total: Number


class Datagrams(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """A `DatagramBatch`; rows and payload follow as arrays. Without rows it is a mark: the sequence starts here.

    With a `chunk` the payload is not in the message, but lent by the sender there (`shared.bus.loans`). `loan` is the
    number of that loan, otherwise of the last one before. Each datagram is at a multiple of `stride` if there is one.
    The kernel has copied each for all that are in the `KernelCopies` of `generation`; 0: for nobody. Where rows differ,
    `generations` has two bytes for each. An `Again` that ends a portion tells how many batches are `left`.
    """

    stream: StreamName
    received_ns: Number
    loan: Number = 0
    chunk: Number | None = None
    stride: Annotated[int, Meta(ge=0, le=MAX_DATAGRAM)] = 0
    left: Number = 0
    generation: MarkGeneration = 0
    generations: Annotated[bytes, Meta(max_length=2 * MAX_ROWS)] = b""


class Again(Datagrams, frozen=True):
    """A batch again, with the numbers of its message, for a sender of copies that was being restarted.

    Without rows it ends a portion.
    """


class RegistrySnapshot(msgspec.Struct, array_like=True, frozen=True):
    """One of `pieces` pieces of the whole registry at `revision`."""

    revision: Number
    piece: int
    pieces: int
    clients: list[Client]


class RegistryChange(msgspec.Struct, array_like=True, frozen=True):
    """The change from the registry at revision `after` to that at `revision`."""

    after: Number
    revision: Number
    joined: list[Client]
    left: list[str]


class ServeRequest(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Asks the sender of copies to answer on topic `reply` once it serves the registry as of `revision`."""

    id: int
    reply: ReplyTopic
    revision: int


class ServeReply(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """The answer to a `ServeRequest`: copies flow to every collector of `revision` that is for this sender."""

    id: int
    revision: int


class TransmitRequest(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Asks the transmitter to put `frame` on an interface byte for byte, and to answer on topic `reply`.

    `frame` is complete: destination, source, ethertype, payload and whatever checksum of its own it carries. With
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
    """The number of frames of a `TransmitRequest` that have left, and the reason when that is not all.

    `error` is a word of the JSON protocol: `bad_request`, `not_permitted` or `unavailable`; empty when all have left.
    """

    id: int
    sent: Number
    error: str = ""
    message: str = ""


class Status(msgspec.Struct, array_like=True, frozen=True):
    """One of `pieces` pieces of a service's accounts, numbered `report`: see `shared.ledger.counters`."""

    service: str
    pid: int
    started_ns: int
    report: int
    piece: int
    pieces: int
    accounts: dict[str, dict[str, Annotated[int, Meta(le=MAX_NUMBER)]]]
    release: Annotated[str, Meta(max_length=64)] = ""
    """The version of its program; of one that does not tell it, nothing."""
    ended: bool = False
    """True in the last report of a sender of copies, which has sent all that it will, and of an ingest worker."""


Body = (
    Datagrams
    | Again
    | RegistrySnapshot
    | RegistryChange
    | ServeRequest
    | ServeReply
    | TransmitRequest
    | TransmitReply
    | Status
    | Health
    | Exporters
    | KernelCopies
    | OffloadReply
    | Replayed
    | JournalPortion
    | JournalRead
    | OffloadPaths
    | Templates
    | Renewals
    | CatchUpReport
    | Nodes
)

KINDS: Final[dict[str, type[Body]]] = {
    "datagrams": Datagrams,
    "again": Again,
    "registry.snapshot": RegistrySnapshot,
    "registry.change": RegistryChange,
    "serve.request": ServeRequest,
    "serve.reply": ServeReply,
    "transmit.request": TransmitRequest,
    "transmit.reply": TransmitReply,
    "status": Status,
    "health": Health,
    "exporters": Exporters,
    "replay.batch": Replayed,
    "replay.portion": JournalPortion,
    "journal.read": JournalRead,
    "offload.copies": KernelCopies,
    "offload.reply": OffloadReply,
    "offload.paths": OffloadPaths,
    "templates": Templates,
    "renewals": Renewals,
    "catchup": CatchUpReport,
    "nodes": Nodes,
}
_NAMES: Final = {struct: kind for kind, struct in KINDS.items()}


@dataclass(frozen=True, slots=True)
class Message:
    """A message taken from the bus; `batch` is there when the body is `Datagrams` or `Replayed`."""

    topic: str
    envelope: Envelope
    body: Body
    batch: "DatagramBatch | None" = None


def datagrams_topic(stream: str) -> str:
    """The topic of a stream's batches. Ends in `/`, since ZeroMQ matches by prefix."""
    return f"datagrams/{stream}/"


def inline_topic(stream: str) -> str:
    """The topic of subscribers that can't borrow: while it has any, a stream's payloads are in the messages."""
    return f"inline/{stream}/"


def hold_topic(sender: str) -> str:
    """The topic to which a sender of copies subscribes as it ends: workers hold batches for its successor from then."""
    return f"{HOLD_PREFIX}{sender}/"


def again_topic(worker: str, sender: str) -> str:
    """The topic to which that successor subscribes for each portion of what a worker has held, which comes on it."""
    return f"{AGAIN_PREFIX}{worker}/{sender}/"


def status_topic(service: str) -> str:
    """The topic of a service's status, as in `status/ingest.1/`."""
    return f"status/{service}/"


def serve_topic(source: Source) -> str:
    """The topic of `ServeRequest`s for one kind of copies; only a process that can send them subscribes to it."""
    return f"serve/{source}/"


def health_topic(source: Source) -> str:
    """The topic of the `Health` of a source's collectors; it begins with `HEALTH_PREFIX`."""
    return f"{HEALTH_PREFIX}{source}/"


def offload_topic(source: Source) -> str:
    """The topic of the `KernelCopies` of a source's collectors: the sender of its other copies subscribes to it."""
    return f"offload/{source}/"


def exporters_topic(service: str) -> str:
    """The topic on which a worker tells of its exporters while anybody subscribes; begins with `EXPORTERS_PREFIX`."""
    return f"{EXPORTERS_PREFIX}{service}/"


def topic_family(kind: str) -> str:
    """The beginning that all topics of a kind have, so that no message passes for another kind on its topic.

    >>> topic_family("registry.change"), topic_family("serve.reply")
    ('registry/', 'reply/')
    """
    family, _, rest = kind.partition(".")
    return REPLY_PREFIX if rest == "reply" else f"{family}/"


def peek(parts: Sequence[Part]) -> tuple[str, Envelope]:
    """Return topic and envelope of a message of any version, without reading on. MessageError when it has none."""
    try:
        if not 3 <= len(parts) <= 5:
            raise MessageError("malformed", f"{len(parts)} parts")
        if len(parts[0]) > MAX_TOPIC or len(parts[1]) > MAX_ENVELOPE:
            raise MessageError("malformed", f"topic of {len(parts[0])} and envelope of {len(parts[1])} bytes")
        return str(parts[0], "utf-8"), unpack(parts[1], Envelope)
    except MessageError:
        raise
    except (msgspec.MsgspecError, ValueError) as error:
        raise MessageError("malformed", f"{type(error).__name__}: {error}") from None


HEALTH_PREFIX: Final = "health/"
HOLD_PREFIX: Final = "hold/"
AGAIN_PREFIX: Final = "again/"
EXPORTERS_PREFIX: Final = "exporters/"
REGISTRY_TOPIC: Final = "registry/"
TRANSMIT_TOPIC: Final = "transmit/"


def encode(
    topic: str, body: Body, *, sender: str, boot: int, sequence: int, total: int, batch: "DatagramBatch | None" = None
) -> list[Part]:
    """Return the parts of a message. The arrays are the batch's own buffers, not copies; a lent payload is left out."""
    envelope = Envelope(VERSION, _NAMES[type(body)], sender, boot, sequence, total)
    packed = _pack_batch(body) if isinstance(body, Datagrams) else pack(body)
    parts: list[Part] = [topic.encode(), pack_values(msgspec.structs.astuple(envelope)), packed]
    if batch is not None:
        parts.append(batch.rows.tobytes())
    if batch is not None and not (isinstance(body, Datagrams) and body.chunk is not None):
        parts.append(batch.payload)
    return parts


def _pack_batch(body: Datagrams) -> bytes:
    """Pack the body of a batch; one without a generation is what it was before there were any."""
    fields = msgspec.structs.astuple(body)
    if not (body.generation or body.generations):
        fields = fields[: PLAIN_FIELDS + isinstance(body, Again)]
    return pack_values(fields)


Borrow = Callable[[Envelope, Datagrams, int], Part]
"""Finds a lent payload of a number of bytes; MessageError when it can't be had."""


def borrow_nothing(_envelope: Envelope, _body: Datagrams, _size: int) -> Part:
    """Refuse: this reader reads only payloads that are in the messages."""
    raise MessageError("not_borrowed", "the payload is lent, and this reader does not borrow")


def decode(parts: Sequence[Part], borrow: Borrow = borrow_nothing) -> Message:
    """Return the message in `parts`; a batch's columns are read-only views of them. MessageError when it is none."""
    try:
        return _decode(parts, borrow)
    except MessageError:
        raise
    except (msgspec.MsgspecError, ValueError) as error:
        raise MessageError("malformed", f"{type(error).__name__}: {error}") from None


def _decode(parts: Sequence[Part], borrow: Borrow) -> Message:
    topic, envelope = peek(parts)
    if envelope.version != VERSION:
        raise MessageError("bad_version", f"version {envelope.version}, this is {VERSION}")
    if envelope.kind not in KINDS:
        raise MessageError("unknown_kind", f"kind {envelope.kind[:40]!r}")
    if len(parts[2]) > MAX_MESSAGE:
        raise MessageError("malformed", f"body of {len(parts[2])} bytes")
    body = unpack(parts[2], KINDS[envelope.kind])
    if not isinstance(body, Datagrams | Replayed):
        if isinstance(body, Status) and body.service != envelope.sender:
            raise MessageError("malformed", f"status of {body.service[:40]!r} from {envelope.sender}")
        if len(parts) != 3:
            raise MessageError("malformed", f"{envelope.kind} with {len(parts)} parts")
        return Message(topic, envelope, body)
    if isinstance(body, Replayed):
        if len(parts) != 5 or not topic.startswith(REPLAY_PREFIX):
            raise MessageError("malformed", f"batch out of the journal on {topic[:40]!r} in {len(parts)} parts")
        return Message(topic, envelope, body, _decode_batch(envelope, Datagrams(body.stream, body.received_ns), parts))
    if topic != datagrams_topic(body.stream) and not (isinstance(body, Again) and topic.startswith(AGAIN_PREFIX)):
        raise MessageError("malformed", f"datagrams of stream {body.stream[:40]!r} on topic {topic[:40]!r}")
    if len(parts) != (5 if body.chunk is None else 4):
        raise MessageError("malformed", f"datagrams with {len(parts)} parts")
    return Message(topic, envelope, body, _decode_batch(envelope, body, parts, borrow))


def _decode_batch(
    envelope: Envelope, body: Datagrams, parts: Sequence[Part], borrow: Borrow = borrow_nothing
) -> "DatagramBatch":
    from shared.datagrams.batch import DatagramBatch, read_generations, read_rows  # others start without numpy

    rows = read_rows(parts[3])
    generations = read_generations(len(rows), body.generation, body.generations)
    if body.chunk is None:
        payload = parts[4]
    else:
        payload = borrow(envelope, body, body.stride * len(rows) or int(rows["length"].sum()))
    batch = DatagramBatch(body.stream, body.received_ns, rows, payload, body.stride, generations)
    batch.check()
    return batch
