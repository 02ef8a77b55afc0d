"""The message that travels between sites: a head, and the parts of several batches as they are on the bus. No I/O.

The head has a mark of the format, the number of batches, and `after`: the worker's running count of datagrams at the
end of what the sender had sent before of this stream. So a reader knows whether an earlier message is still to come,
or whether a gap was there before the message was made. Behind it stand the lengths of four parts for each batch, then
these parts: envelope, body, rows and payload (`shared.bus.messages`). The topic follows from the subject.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

from services.uplink.subjects import Origin
from shared.bus.messages import Datagrams, Message, MessageError, Part, datagrams_topic, decode, encode
from shared.datagrams.batch import DatagramBatch
from shared.datagrams.limits import MAX_PAYLOAD

MARK: Final = b"FWU1"
"""Begins each message; the digit is the version of this format."""
HEAD: Final = struct.Struct("<4sIq")
LENGTHS: Final = struct.Struct("<4I")
UNKNOWN: Final = -1
"""`after` of the first message of a sender: what was sent before by others, it does not know."""
FULL: Final = 450_000
"""Bytes of a message beyond which no further batch goes into it: with larger ones JetStream gains little."""
MAX_BATCHES: Final = 4096
LARGEST_BATCH: Final = MAX_PAYLOAD + (1 << 16)
"""Bytes that one batch may take, its rows and numbers among them: what `max_payload` of a server has to allow."""


@dataclass(frozen=True, slots=True)
class Pack:
    """A message that is to be sent: its origin, and what it has of it.

    `first` and `last` are sequence numbers of batches. `stop` is the worker's running count behind it, `received_ns`
    the time of its last batch.
    """

    origin: Origin
    boot: int
    first: int
    last: int
    datagrams: int
    payload: bytes
    stop: int = 0
    received_ns: int = 0

    @property
    def number(self) -> str:
        """Return what tells it from all others (Nats-Msg-Id): the worker's boot id, its name, and sequence numbers.

        Another choice of batches is another message: a reader tells by each batch whether it has had it.
        """
        worker, stream = self.origin.worker, self.origin.stream
        return f"{self.boot:x}/{worker}/{stream}/{self.first}-{self.last}"


class Packer:
    """Makes messages of the batches that one worker's start has published on a stream."""

    def __init__(self, origin: Origin, boot: int, after: int = UNKNOWN) -> None:
        self.origin = origin
        self.boot = boot
        self.size = 0
        self.since = 0.0
        """The time of the first batch that waits here, as the caller notes it."""
        self.datagrams = 0
        self._after = after
        self._reached = self._received_ns = 0
        self._first = self._last = 0
        self._lengths: list[bytes] = []
        self._parts: list[Part] = []

    def add(self, message: Message, batch: DatagramBatch) -> None:
        """Let a batch into the message; its memory is copied now only where it is lent."""
        envelope, body = message.envelope, message.body
        assert isinstance(body, Datagrams)
        payload = _without_gaps(batch) if batch.stride else batch.payload
        if body.chunk is not None and not batch.stride:
            payload = bytes(payload)
        plain = DatagramBatch(body.stream, body.received_ns, batch.rows, payload)
        parts = encode(
            message.topic,
            Datagrams(body.stream, body.received_ns),
            sender=envelope.sender,
            boot=envelope.boot,
            sequence=envelope.sequence,
            total=envelope.total,
            batch=plain,
        )[1:]
        lengths = [len(part) for part in parts]
        if not self._parts:
            self._first = envelope.sequence
        self._lengths.append(LENGTHS.pack(*lengths))
        self._parts += parts
        self._last, self._reached = envelope.sequence, envelope.total + len(batch)
        self._received_ns = body.received_ns
        self.size += LENGTHS.size + sum(lengths)
        self.datagrams += len(batch)

    @property
    def full(self) -> bool:
        """Return whether the message is large enough to go."""
        return self.size >= FULL or len(self._lengths) >= MAX_BATCHES

    def close(self) -> Pack:
        """Return the message of the batches that wait here; begin another one."""
        head = HEAD.pack(MARK, len(self._lengths), self._after)
        payload = b"".join((head, *self._lengths, *self._parts))
        numbers = self._first, self._last, self.datagrams
        pack = Pack(self.origin, self.boot, *numbers, payload, self._reached, self._received_ns)
        self._after = self._reached
        self._lengths, self._parts = [], []
        self.size = self.datagrams = 0
        return pack


def _without_gaps(batch: DatagramBatch) -> bytes:
    view, stride = memoryview(batch.payload), batch.stride
    return b"".join([view[at * stride : at * stride + length] for at, length in enumerate(batch.length_list)])


class Arrived(NamedTuple):
    """A message that has come: the boot id of its worker, its `after`, its batches, and its size in bytes."""

    origin: Origin
    boot: int
    after: int
    batches: list[Message]
    size: int
    reply: str = ""
    """The subject on which it is acknowledged."""


def read_pack(origin: Origin, payload: bytes, reply: str = "") -> Arrived:
    """Return what a message holds; its columns are views of it. MessageError when it is none of this origin."""
    batches = list(_read(origin, payload))
    boots = {batch.envelope.boot for batch in batches}
    if len(boots) != 1:
        raise MessageError("malformed", f"batches of {len(boots)} starts of a worker in one message")
    return Arrived(origin, boots.pop(), HEAD.unpack_from(payload)[2], batches, len(payload), reply)


def _read(origin: Origin, payload: bytes) -> Iterator[Message]:
    if len(payload) < HEAD.size or payload[:3] != MARK[:3]:
        raise MessageError("malformed", "none of fanwire's messages between sites")
    mark, count, after = HEAD.unpack_from(payload)
    if mark != MARK:
        raise MessageError("bad_version", f"a message of another format, {mark!r}; this is {MARK!r}")
    start = HEAD.size + count * LENGTHS.size
    if not 1 <= count <= MAX_BATCHES or after < UNKNOWN or start > len(payload):
        raise MessageError("malformed", f"a head that tells of {count} batches, in {len(payload)} bytes")
    topic, view = datagrams_topic(origin.stream).encode(), memoryview(payload)
    for lengths in LENGTHS.iter_unpack(view[HEAD.size : start]):
        parts: list[Part] = [topic]
        for place, length in enumerate(lengths):
            part = view[start : start + length]
            start += length
            parts.append(bytes(part) if place < 2 else part)
        message = decode(parts)
        if message.batch is None or type(message.body) is not Datagrams or message.envelope.sender != origin.worker:
            raise MessageError("malformed", f"{message.envelope.kind} of {message.envelope.sender} under another name")
        yield message
    if start != len(payload):
        raise MessageError("malformed", f"{len(payload) - start} bytes too many or too few behind its batches")
