"""One batch as blocks of pcapng, and back: the first block has the batch's identity in an option. No I/O.

The option is of the kind that programs keep which do not know it (code 2989, behind the Private Enterprise Number that
RFC 5612 gives to documentation). It begins with `MAGIC`, so that a record is found again behind damaged bytes, and has
a CRC over what is read back: identity, rows and payloads. The rest of the headers is made up, and not read.
"""

import struct
import zlib
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from shared.capture.pcapng import (
    BLOCK_HEAD,
    CUSTOM_BYTES,
    END_OF_OPTIONS,
    ENHANCED,
    TRAILER,
    UDP_SIZE,
    Destination,
    make_option,
)
from shared.capture.writer import PacketPieces
from shared.datagrams.batch import ROW, DatagramBatch
from shared.datagrams.limits import MAX_DATAGRAM, MAX_PAYLOAD, MAX_ROWS
from shared.net.addresses import V4_MAPPED

ENTERPRISE: Final = struct.pack("<I", 32473)
MAGIC: Final = b"fanwire\x01"
_FIXED: Final = struct.Struct("<8sIIIHBxQQQQQBB")
"""Magic, CRC, bytes of the record, where in it the magic is, rows, families, the segment's beginning, time of receipt,
boot, sequence, total, and the lengths of the two names behind it. Then come 2 bytes a row: the payload's length."""
_CHECKED_FROM: Final = 12
"""The CRC covers what stands behind it."""
ALL_FOUR, ALL_SIX, MIXED = 0, 1, 2
"""Families of the rows' addresses; where they are mixed, a bit a row follows: 1 for IPv6."""
OPTION_HEAD: Final = 8
MAX_OPTION: Final = OPTION_HEAD + _FIXED.size + 64 + 64 + 2 * MAX_ROWS + MAX_ROWS // 8 + 4 + 4
HEADERS4, HEADERS6 = 20 + UDP_SIZE, 40 + UDP_SIZE
MAX_BLOCK: Final = BLOCK_HEAD + HEADERS6 + MAX_DATAGRAM + 4 + MAX_OPTION + TRAILER
MAX_RECORD: Final = MAX_PAYLOAD + MAX_DATAGRAM + MAX_ROWS * (BLOCK_HEAD + HEADERS6 + 4 + TRAILER) + MAX_OPTION
_SOURCE4, _SOURCE6 = BLOCK_HEAD + 12, BLOCK_HEAD + 8
"""Place of the source address in a block; the destination follows it, and the ports."""
FEW: Final = 8
"""Payloads of so few rows are sooner joined than copied as an array."""

Offsets = npt.NDArray[np.int64]


class RecordError(ValueError):
    """Bytes that are no whole record."""


@dataclass(frozen=True, slots=True)
class Identity:
    """The numbers that a batch has on the bus: those of its worker's message."""

    worker: str
    boot: int
    sequence: int
    total: int


class Reached(NamedTuple):
    """A worker's start, and the datagrams that it has published on the stream since then."""

    boot: int
    total: int


@dataclass(frozen=True, slots=True)
class Head:
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


class Record:
    """A batch ready to be written: its blocks in memory, and how many bytes they are."""

    def __init__(self, identity: Identity, batch: DatagramBatch, began_ns: int, destination: Destination) -> None:
        packed = batch = pack_payload(batch)
        families, captured = ALL_FOUR, batch.lengths + HEADERS4
        if not batch.all_ipv4:
            is_six = _is_six(batch)
            families, captured = ALL_SIX if is_six.all() else MIXED, captured + 20 * is_six
        worker, stream = identity.worker.encode(), batch.stream.encode()
        tail = worker + stream + batch.rows["length"].tobytes()
        if families == MIXED:
            tail += np.packbits(is_six).tobytes()
        data_size = _FIXED.size + len(tail)
        options_size = OPTION_HEAD + data_size + -data_size % 4 + 4
        size = int((captured + 3 & ~3).sum()) + len(batch) * (BLOCK_HEAD + TRAILER) + options_size
        option_at = BLOCK_HEAD + int(captured[0]) + -int(captured[0]) % 4 + OPTION_HEAD
        numbers = (began_ns, batch.received_ns, identity.boot, identity.sequence, identity.total)
        names = (len(worker), len(stream))
        data = _FIXED.pack(MAGIC, 0, size, option_at, len(batch), families, *numbers, *names) + tail
        crc = _crc(data, batch.rows.tobytes(), packed.payload)
        data = data[:8] + struct.pack("<I", crc) + data[12:]
        options = make_option(CUSTOM_BYTES, ENTERPRISE + data) + make_option(END_OF_OPTIONS)
        self._batch = packed
        self._pieces = PacketPieces(packed, None, destination, options)
        self.size = size

    def append_to(self, descriptor: int) -> None:
        """Write it with one writev(2), or several for over 500 rows. OSError, after part of it perhaps."""
        self._pieces.append_to(descriptor)


def pack_payload(batch: DatagramBatch) -> DatagramBatch:
    """Return the batch with its payloads end to end; itself where they are."""
    if not batch.stride:
        return batch
    length = batch.length_list[0]
    whole = np.frombuffer(batch.payload, np.uint8).reshape(len(batch), batch.stride)
    if (batch.rows["length"] == length).all():
        payload = np.ascontiguousarray(whole[:, :length]).tobytes()
    else:
        payload = b"".join(_slices(memoryview(batch.payload), batch.offsets[:-1], batch.length_list))
    return DatagramBatch(batch.stream, batch.received_ns, batch.rows, payload)


def _slices(buffer: memoryview, starts: Offsets, lengths: list[int]) -> list[memoryview]:
    return [buffer[start : start + length] for start, length in zip(starts.tolist(), lengths, strict=True)]


def _is_six(batch: DatagramBatch) -> npt.NDArray[np.bool_]:
    mapped = np.frombuffer(V4_MAPPED, np.uint8)
    is_six: npt.NDArray[np.bool_] = (batch.rows["address"][:, :12] != mapped).any(axis=1)
    return is_six


def _crc(data: bytes, rows: bytes, payload: bytes | memoryview) -> int:
    return zlib.crc32(payload, zlib.crc32(rows, zlib.crc32(data[_CHECKED_FROM:])))


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
    if len(data) < _FIXED.size:
        raise RecordError("the identity is cut short")
    return int(_FIXED.unpack_from(data)[3])


def parse_option(data: bytes, option_at: int, offset: int, began_ns: int) -> Head:
    """Read a record's head from its option's data, which may be followed by more. RecordError when it is none."""
    if len(data) < _FIXED.size or not data.startswith(MAGIC):
        raise RecordError("no identity")
    _, crc, size, told_at, rows, families, told_began, received_ns, *rest = _FIXED.unpack_from(data)
    boot, sequence, total, worker_size, stream_size = rest
    lengths_at = _FIXED.size + worker_size + stream_size
    end = lengths_at + 2 * rows + (-(-rows // 8) if families == MIXED else 0)
    if told_at != option_at or told_began != began_ns or not 0 < rows <= MAX_ROWS or families > MIXED:
        raise RecordError("the identity is of another segment, or damaged")
    if end > len(data) or not option_at + end < size <= MAX_RECORD:
        raise RecordError("the identity is cut short")
    try:
        worker = str(data[_FIXED.size : _FIXED.size + worker_size], "utf-8")
        stream = str(data[_FIXED.size + worker_size : lengths_at], "utf-8")
    except UnicodeDecodeError:
        raise RecordError("the identity is damaged") from None
    identity = Identity(worker, boot, sequence, total)
    option = bytes(data[:end])
    return Head(offset, size, identity, stream, received_ns, rows, crc, option, option_at, families, lengths_at)


def read_batch(head: Head, record: bytes) -> tuple[DatagramBatch, Destination]:
    """Return the batch of a record, and the destination in its headers. RecordError when its bytes are damaged."""
    if len(record) != head.size:
        raise RecordError("the record is cut short")
    length_column = np.frombuffer(head.option, "<u2", head.rows, head.lengths_at)
    lengths = length_column.astype(np.int64)
    if head.families == MIXED:
        bits = np.frombuffer(head.option, np.uint8, offset=head.lengths_at + 2 * head.rows)
        is_six = np.unpackbits(bits, count=head.rows).astype(np.bool_)
    else:
        is_six = np.full(head.rows, head.families == ALL_SIX)
    captured = lengths + np.where(is_six, HEADERS6, HEADERS4)
    sizes = BLOCK_HEAD + captured + -captured % 4 + TRAILER
    sizes[0] += OPTION_HEAD + len(head.option) + -len(head.option) % 4 + 4
    starts = np.zeros(head.rows + 1, np.int64)
    np.cumsum(sizes, out=starts[1:])
    if starts[-1] != head.size:
        raise RecordError("its lengths do not add up to its size")
    starts = starts[:-1]
    rows = np.zeros(head.rows, ROW)
    rows["length"] = length_column
    destination = _read_sources(record, starts, is_six, rows)
    payload = _read_payload(record, starts + BLOCK_HEAD + (captured - lengths), lengths, sizes)
    if _crc(head.option, rows.tobytes(), payload) != head.crc:
        raise RecordError("its checksum is wrong")
    return DatagramBatch(head.stream, head.received_ns, rows, payload), destination


def _read_sources(
    record: bytes, starts: Offsets, is_six: npt.NDArray[np.bool_], rows: npt.NDArray[np.void]
) -> Destination:
    """Fill in the rows' addresses and ports; return the destination of the first row of each family."""
    words = np.frombuffer(record, "<u4")  # blocks begin at multiples of four bytes
    addresses = np.zeros((len(starts), 4), "<u4")
    port, found = 0, [b"", b""]
    ports = np.empty(len(starts), "<u2")
    for family, source, size in ((0, _SOURCE4, 4), (1, _SOURCE6, 16)):
        of_family = np.flatnonzero(is_six == bool(family))
        if not len(of_family):
            continue
        at = (starts[of_family] + source) >> 2
        if family:
            addresses[of_family] = words[at[:, None] + np.arange(4)]
        else:
            addresses[of_family, 2], addresses[of_family, 3] = 0xFFFF0000, words[at]
        both = words[at + 2 * size // 4]
        ports[of_family] = (both & 0xFFFF).astype("<u2").byteswap()
        first = int(at[0]) * 4
        found[family] = record[first + size : first + 2 * size]
        port = int.from_bytes(record[first + 2 * size + 2 : first + 2 * size + 4])
    rows["address"] = addresses.view(np.uint8)
    rows["port"] = ports
    unknown = Destination()
    return Destination(port, V4_MAPPED + found[0] if found[0] else unknown.four, found[1] or unknown.six)


def _read_payload(record: bytes, starts: Offsets, lengths: Offsets, sizes: Offsets) -> bytes:
    """Return the payloads end to end."""
    count, length = len(starts), int(lengths[0])
    if count > FEW and (lengths == length).all() and (sizes[1:] == sizes[1]).all():
        first, second, step = int(starts[0]), int(starts[1]), int(sizes[1])
        rest = np.lib.stride_tricks.as_strided(np.frombuffer(record, np.uint8)[second:], (count - 1, length), (step, 1))
        return record[first : first + length] + rest.tobytes()
    return b"".join(_slices(memoryview(record), starts, lengths.tolist()))
