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
from shared.bus.messages import Datagrams, Envelope, Message, MessageError, Part, datagrams_topic, decode, encode
from shared.datagrams.batch import DatagramBatch
from shared.datagrams.limits import MAX_PAYLOAD, MAX_ROWS, ROW_SIZE

MARK: Final = b"FWU1"
"""Begins each message; the digit is the version of this format."""
HEAD: Final = struct.Struct("<4sIq")
LENGTHS: Final = struct.Struct("<4I")
UNKNOWN: Final = -1
"""`after` of the first message of a sender: what was sent before by others, it does not know."""
FULL: Final = 450_000
"""Bytes of a message beyond which no further batch goes into it: with larger ones JetStream gains little."""
MAX_BATCHES: Final = 4096
JOIN_NS: Final = 5_000_000
"""Batches that were received so soon after another join it, and have its time of receipt."""
LARGEST_BATCH: Final = MAX_PAYLOAD + (1 << 16)
"""Bytes that one batch may take, its rows and numbers among them: what `max_payload` of a server has to allow."""


@dataclass(frozen=True, slots=True)
class Pack:
    """A message that is to be sent: its origin, and what it has of it.

    `start` and `stop` are the worker's running counts before it and behind it, `last` is the sequence number of its
    last batch, `received_ns` the time of that.
    """

    origin: Origin
    boot: int
    start: int
    last: int
    datagrams: int
    payload: bytes
    stop: int = 0
    received_ns: int = 0

    @property
    def number(self) -> str:
        """Return what tells it from all others (Nats-Msg-Id): the worker's boot id, its name, and running counts.

        Another choice of batches is another message: a reader tells by each batch whether it has had it.
        """
        worker, stream = self.origin.worker, self.origin.stream
        return f"{self.boot:x}/{worker}/{stream}/{self.start}-{self.stop}"


class _Joined:
    """Batches that follow each other, and become one: what one costs, here and there, is hardly by its datagrams."""

    def __init__(self, envelope: Envelope, received_ns: int) -> None:
        self.count = self.size = 0
        self._envelope = envelope
        self._received_ns = received_ns
        self._rows: list[Part] = []
        self._payloads: list[Part] = []

    def takes(self, envelope: Envelope, batch: DatagramBatch) -> bool:
        """Return whether a batch may go in: behind the last, received soon after the first, and where it fits."""
        return (
            envelope.total == self._envelope.total + self.count
            and 0 <= batch.received_ns - self._received_ns <= JOIN_NS
            and self.count + len(batch) <= MAX_ROWS
            and self.size + len(batch.payload) <= MAX_PAYLOAD
        )

    def add(self, batch: DatagramBatch, payload: Part) -> None:
        """Take a batch, whose payloads stand end to end."""
        self._rows.append(batch.rows.tobytes())
        self._payloads.append(payload)
        self.count += len(batch)
        self.size += len(payload)

    def parts(self, origin: Origin) -> list[Part]:
        """Return envelope, body, and in any number of pieces the rows and the payload."""
        envelope, topic = self._envelope, datagrams_topic(origin.stream)
        head = encode(
            topic,
            Datagrams(origin.stream, self._received_ns),
            sender=envelope.sender,
            boot=envelope.boot,
            sequence=envelope.sequence,
            total=envelope.total,
        )
        return [*head[1:], *self._rows, *self._payloads]


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
        self._start = self._reached = self._last = self._received_ns = 0
        self._lengths: list[bytes] = []
        self._parts: list[Part] = []
        self._joined: _Joined | None = None

    def add(self, message: Message, batch: DatagramBatch) -> None:
        """Let a batch into the message; its memory is copied now only where it is lent."""
        envelope, body = message.envelope, message.body
        assert isinstance(body, Datagrams)
        payload = batch.packed() if batch.stride or body.chunk is not None else batch.payload
        if not self.datagrams:
            self._start = envelope.total
        if self._joined is None or not self._joined.takes(envelope, batch):
            self._end_batch()
            self._joined = _Joined(envelope, body.received_ns)
        self._joined.add(batch, payload)
        self._last, self._reached = envelope.sequence, envelope.total + len(batch)
        self._received_ns = body.received_ns
        self.size += ROW_SIZE * len(batch) + len(payload)
        self.datagrams += len(batch)

    def _end_batch(self) -> None:
        joined, self._joined = self._joined, None
        if joined:
            parts = joined.parts(self.origin)
            self._lengths.append(LENGTHS.pack(len(parts[0]), len(parts[1]), ROW_SIZE * joined.count, joined.size))
            self._parts += parts
            self.size += LENGTHS.size + len(parts[0]) + len(parts[1])

    @property
    def full(self) -> bool:
        """Return whether the message is large enough to go."""
        return self.size >= FULL or len(self._lengths) >= MAX_BATCHES

    def close(self) -> Pack:
        """Return the message of the batches that wait here; begin another one."""
        self._end_batch()
        head = HEAD.pack(MARK, len(self._lengths), self._after)
        payload = b"".join((head, *self._lengths, *self._parts))
        numbers = self._start, self._last, self.datagrams
        pack = Pack(self.origin, self.boot, *numbers, payload, self._reached, self._received_ns)
        self._after = self._reached
        self._lengths, self._parts = [], []
        self.size = self.datagrams = 0
        return pack


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
