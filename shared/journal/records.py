"""One batch as blocks of pcapng, and back: the first block has the batch's identity in an option. No I/O.

The option is of the kind that programs keep which do not know it (code 2989, behind the Private Enterprise Number that
RFC 5612 gives to documentation). It begins with `MAGIC`, so that a record is found again behind damaged bytes, and has
a CRC over what is read back: identity, rows and payloads. The rest of the headers is made up, and not read.
"""

import struct
import zlib
from collections.abc import Mapping
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from shared.capture.pcapng import (
    BLOCK_HEAD,
    ENHANCED,
    HEADERS4,
    HEADERS6,
    TRAILER,
    Destination,
)
from shared.datagrams.batch import MAPPED, DatagramBatch, read_rows
from shared.datagrams.limits import MAX_DATAGRAM, MAX_PAYLOAD, MAX_ROWS, ROW_SIZE
from shared.net.addresses import V4_MAPPED

ENTERPRISE: Final = struct.pack("<I", 32473)
MAGIC: Final = b"fanwire\x01"
FIXED: Final = struct.Struct("<8sIIIHBxQQQQQBB")
"""Magic, CRC, bytes of the record, where in it the magic is, rows, families, the segment's beginning, time of receipt,
boot, sequence, total, and the lengths of the two names behind it. Then come 2 bytes a row: the payload's length."""
CRC_AT: Final = 8
"""Place of the CRC, which covers what stands behind it."""
ALL_FOUR, ALL_SIX, MIXED = 0, 1, 2
"""Families of the rows' addresses; where they are mixed, a bit a row follows: 1 for IPv6."""
OPTION_HEAD: Final = 8
MAX_OPTION: Final = OPTION_HEAD + FIXED.size + 64 + 64 + 2 * MAX_ROWS + MAX_ROWS // 8 + 4 + 4
MAX_BLOCK: Final = BLOCK_HEAD + HEADERS6 + MAX_DATAGRAM + 4 + MAX_OPTION + TRAILER
MAX_RECORD: Final = 4 * MAX_PAYLOAD + MAX_ROWS * (BLOCK_HEAD + HEADERS6 + 4 + TRAILER) + MAX_OPTION
"""Journals may have batches that were lent whole, from before `shared.journal.encoding.cut` was there."""
_ROW: Final = struct.Struct("<HH16s")
_FROM4, _FROM6 = struct.Struct(">12x4s4xH"), struct.Struct(">8x16s16xH")
_TO4, _TO6 = struct.Struct(">16x4s2xH"), struct.Struct(">24x16s2xH")
"""Addresses and ports in a packet, by its family."""
FEW_ROWS: Final = 80
"""Rows of a record that are sooner read one by one than as columns."""
UNEQUAL: Final = "its lengths do not add up to its size"

Offsets = npt.NDArray[np.int64]


class RecordError(ValueError):
    """Bytes that are no whole record."""


class Identity(NamedTuple):
    """The numbers that a batch has on the bus: those of its worker's message."""

    worker: str
    boot: int
    sequence: int
    total: int


class Reached(NamedTuple):
    """A worker's start, and the datagrams that it has published on the stream since then."""

    boot: int
    total: int


class Head(NamedTuple):
    """Everything of a record but its rows and payloads; `offset` is where it begins in its segment."""

    offset: int
    size: int
    identity: Identity
    stream: str
    received_ns: int
    rows: int
    crc: int
    option: bytes
    """The option's data, from the magic to its end."""
    option_at: int
    families: int
    lengths_at: int

    @property
    def end(self) -> int:
        """Return where the next record begins."""
        return self.offset + self.size

    @property
    def reached(self) -> Reached:
        """Return what its worker has reached with it."""
        return Reached(self.identity.boot, self.identity.total + self.rows)


def checksum(data: bytes, rows: bytes, payload: bytes | memoryview) -> int:
    """Return the CRC over an option's data, its rows and its payloads."""
    return zlib.crc32(payload, zlib.crc32(rows, zlib.crc32(data[CRC_AT + 4 :])))


def first_block_size(start: bytes) -> int:
    """Return the bytes of the first block of a record that begins with this. RecordError when none begins so."""
    if len(start) < BLOCK_HEAD:
        raise RecordError("the block is cut short")
    kind, size, captured = struct.unpack_from("<II12xI", start)
    if kind != ENHANCED or not BLOCK_HEAD <= size <= MAX_BLOCK or captured > size:
        raise RecordError("no block of a datagram")
    return int(size)


def parse_head(block: bytes, offset: int, began_ns: int) -> Head:
    """Read a record's head from its first block. RecordError when that is none of the segment that began then."""
    if len(block) < BLOCK_HEAD:
        raise RecordError("the block is cut short")
    (captured,) = struct.unpack_from("<I", block, BLOCK_HEAD - 8)
    option_at = BLOCK_HEAD + captured + -captured % 4 + OPTION_HEAD
    return parse_option(block[option_at:], option_at, offset, began_ns)


def told_offset(data: bytes) -> int:
    """Return where in its record an option's data begins, as they say. RecordError when they are cut short."""
    if len(data) < FIXED.size:
        raise RecordError("the identity is cut short")
    return int(FIXED.unpack_from(data)[3])


def parse_option(data: bytes, option_at: int, offset: int, began_ns: int) -> Head:
    """Read a record's head from its option's data, which may be followed by more. RecordError when it is none."""
    if len(data) < FIXED.size or not data.startswith(MAGIC):
        raise RecordError("no identity")
    _, crc, size, told_at, rows, families, told_began, received_ns, *rest = FIXED.unpack_from(data)
    boot, sequence, total, worker_size, stream_size = rest
    lengths_at = FIXED.size + worker_size + stream_size
    end = lengths_at + 2 * rows + (-(-rows // 8) if families == MIXED else 0)
    if told_at != option_at or told_began != began_ns or not 0 < rows <= MAX_ROWS or families > MIXED:
        raise RecordError("the identity is of another segment, or damaged")
    if end > len(data) or not option_at + end < size <= MAX_RECORD:
        raise RecordError("the identity is cut short")
    try:
        worker = str(data[FIXED.size : FIXED.size + worker_size], "utf-8")
        stream = str(data[FIXED.size + worker_size : lengths_at], "utf-8")
    except UnicodeDecodeError:
        raise RecordError("the identity is damaged") from None
    identity = Identity(worker, boot, sequence, total)
    option = bytes(data[:end])
    return Head(offset, size, identity, stream, received_ns, rows, crc, option, option_at, families, lengths_at)


def read_batch(head: Head, record: bytes) -> tuple[DatagramBatch, Destination]:
    """Return the batch of a record, and the destination in its headers. RecordError when its bytes are damaged."""
    if len(record) != head.size:
        raise RecordError("the record is cut short")
    options_size = OPTION_HEAD + len(head.option) + -len(head.option) % 4 + 4
    rows, payload, destination = (_read_few if head.rows <= FEW_ROWS else _read_many)(head, record, options_size)
    if checksum(head.option, rows, payload) != head.crc:
        raise RecordError("its checksum is wrong")
    return DatagramBatch(head.stream, head.received_ns, read_rows(rows), payload), destination


def _read_few(head: Head, record: bytes, options_size: int) -> tuple[bytes, bytes, Destination]:
    """Return rows, payloads and destination, read one by one."""
    lengths = struct.unpack_from(f"<{head.rows}H", head.option, head.lengths_at)
    headers = [HEADERS6 if six else HEADERS4 for six in _families(head).tolist()]
    sizes = [(length + header + 3 & ~3) + BLOCK_HEAD + TRAILER for length, header in zip(lengths, headers, strict=True)]
    sizes[0] += options_size
    if sum(sizes) != head.size:
        raise RecordError(UNEQUAL)
    rows: list[bytes] = []
    payloads: list[bytes] = []
    at, firsts = BLOCK_HEAD, dict[int, int]()
    for length, header, size in zip(lengths, headers, sizes, strict=True):
        if header == HEADERS4:
            address, port = _FROM4.unpack_from(record, at)
            address = V4_MAPPED + address
        else:
            address, port = _FROM6.unpack_from(record, at)
        firsts.setdefault(header, at)
        rows.append(_ROW.pack(length, port, address))
        payloads.append(record[at + header : at + header + length])
        at += size
    return b"".join(rows), b"".join(payloads), _destination(record, firsts)


def _read_many(head: Head, record: bytes, options_size: int) -> tuple[bytes, bytes, Destination]:
    """Return rows, payloads and destination, read as columns."""
    lengths = np.frombuffer(head.option, "<u2", head.rows, head.lengths_at).astype(np.int64)
    six = _families(head)
    headers = np.where(six, HEADERS6, HEADERS4)
    sizes = (lengths + headers + 3 & ~3) + (BLOCK_HEAD + TRAILER)
    sizes[0] += options_size
    starts = np.cumsum(sizes)
    if starts[-1] != head.size:
        raise RecordError(UNEQUAL)
    starts -= sizes - BLOCK_HEAD
    rows, firsts = np.zeros((head.rows, ROW_SIZE // 4), "<u4"), dict[int, int]()
    numbers = np.frombuffer(record, "<u4")  # blocks begin at multiples of four bytes
    for header in {HEADERS4, HEADERS6} if head.families == MIXED else {int(headers[0])}:
        some = np.flatnonzero(headers == header) if head.families == MIXED else np.arange(head.rows)
        at = starts[some] >> 2
        if header == HEADERS4:
            rows[some, 3], rows[some, 4], ports = MAPPED, numbers[at + 3], numbers[at + 5]
        else:
            rows[some, 1:], ports = numbers[at[:, None] + np.arange(2, 6)], numbers[at + 10]
        rows[some, 0] = (ports.astype("<u2").byteswap().astype("<u4") << 16) + lengths[some]
        firsts[header] = int(starts[some[0]])
    return rows.tobytes(), _payload(record, starts + headers, lengths, sizes), _destination(record, firsts)


def _families(head: Head) -> npt.NDArray[np.bool_]:
    """Return which rows are IPv6."""
    if head.families != MIXED:
        return np.full(head.rows, head.families == ALL_SIX)
    bits = np.frombuffer(head.option, np.uint8, offset=head.lengths_at + 2 * head.rows)
    return np.unpackbits(bits, count=head.rows).astype(np.bool_)


def _destination(record: bytes, firsts: Mapping[int, int]) -> Destination:
    """Return the destination in the first packet of each family; `firsts` tells by size of headers where it begins."""
    port, unknown = 0, Destination()
    four, six = unknown.four, unknown.six
    if HEADERS4 in firsts:
        last, port = _TO4.unpack_from(record, firsts[HEADERS4])
        four = V4_MAPPED + last
    if HEADERS6 in firsts:
        six, port = _TO6.unpack_from(record, firsts[HEADERS6])
    return Destination(port, four, six)


def _payload(record: bytes, starts: Offsets, lengths: Offsets, sizes: Offsets) -> bytes:
    """Return the payloads end to end."""
    count, length = len(starts), int(lengths[0])
    if (lengths == length).all() and (sizes[1:] == sizes[1]).all():
        first, second, step = int(starts[0]), int(starts[1]), int(sizes[1])
        rest = np.lib.stride_tricks.as_strided(np.frombuffer(record, np.uint8)[second:], (count - 1, length), (step, 1))
        return record[first : first + length] + rest.tobytes()
    return b"".join([record[at : at + size] for at, size in zip(starts.tolist(), lengths.tolist(), strict=True)])
