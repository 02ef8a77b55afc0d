"""Datagrams as blocks of pcapng, the columns of a batch at a time. No I/O.

A batch knows no headers, so they are made up: IP and UDP with the exporter's address and port, and the destination
that the interface was given. The checksums are right, except that UDP over IPv4 has none (RFC 768 allows it). All is
little-endian; draft-ietf-opsawg-pcapng has the format.
"""

import struct
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from shared.datagrams.batch import DatagramBatch, Indices
from shared.net.addresses import V4_MAPPED

SECTION, INTERFACE, ENHANCED, SIMPLE, OBSOLETE = 0x0A0D0D0A, 1, 6, 3, 2
"""Types of block. SECTION reads the same in both byte orders."""
BYTE_ORDER: Final = 0x1A2B3C4D
LINKTYPE_RAW: Final = 101
"""A packet begins with its IPv4 or IPv6 header."""
END_OF_OPTIONS, IF_NAME, IF_TSRESOL, IF_TSOFFSET, USER_APPLICATION = 0, 2, 9, 14, 4
CUSTOM_BYTES: Final = 2989
"""An option that begins with a Private Enterprise Number, and that programs keep which do not know it."""
NANOSECONDS: Final = 9
"""Times are in units of 10 to the minus 9 seconds."""
UDP: Final = 17
UDP_SIZE: Final = 8
HOP_LIMIT: Final = 64
UNKNOWN4, UNKNOWN6 = V4_MAPPED + bytes(4), bytes(16)
"""The unspecified addresses, as a destination that is not known."""

_BLOCK: Final = [
    ("pad", "V4"),
    ("trailer", "<u4"),
    ("type", "<u4"),
    ("block_length", "<u4"),
    ("interface", "<u4"),
    ("time_high", "<u4"),
    ("time_low", "<u4"),
    ("captured", "<u4"),
    ("original", "<u4"),
]
_UDP: Final = [("source_port", ">u2"), ("port", ">u2"), ("udp_length", ">u2"), ("udp_checksum", ">u2")]
HEAD6: Final = np.dtype([
    *_BLOCK,
    ("version", "u1"),
    ("traffic", "V3"),
    ("length", ">u2"),
    ("protocol", "u1"),
    ("hop_limit", "u1"),
    ("source", "u1", (16,)),
    ("destination", "u1", (16,)),
    *_UDP,
])  # fmt: skip
HEAD4: Final = np.dtype([
    *_BLOCK,
    ("version", "u1"),
    ("traffic", "u1"),
    ("length", ">u2"),
    ("fragment", ">u4"),
    ("hop_limit", "u1"),
    ("protocol", "u1"),
    ("checksum", ">u2"),
    ("source", "u1", (4,)),
    ("destination", "u1", (4,)),
    *_UDP,
    ("room", "V20"),
])  # fmt: skip
"""The bytes between two payloads: the end of one block (padding, its length again), and the beginning of the next.

Of the four bytes of padding at most three are written.
"""
PAD, TRAILER, BLOCK_HEAD = 4, 4, 28
BEFORE_IP: Final = PAD + TRAILER + BLOCK_HEAD
assert HEAD4.itemsize == HEAD6.itemsize == BEFORE_IP + 48


@dataclass(frozen=True, slots=True)
class Destination:
    """The address and port that datagrams went to, by the family of their source: 16 packed bytes each."""

    port: int = 0
    four: bytes = UNKNOWN4
    six: bytes = UNKNOWN6


def section_block(application: str, more: bytes = b"") -> bytes:
    """Return the block that a file begins with; its section ends with the file, or where another begins.

    `more` are options besides.
    """
    options = make_option(USER_APPLICATION, application.encode()) + more + make_option(END_OF_OPTIONS)
    return _block(SECTION, struct.pack("<IHHq", BYTE_ORDER, 1, 0, -1) + options)


def interface_block(name: str) -> bytes:
    """Return the block of a section's only interface. libpcap 1.10 takes no second one whose link type is RAW."""
    options = make_option(IF_NAME, name.encode()) + make_option(IF_TSRESOL, bytes([NANOSECONDS]))
    return _block(INTERFACE, struct.pack("<HHI", LINKTYPE_RAW, 0, 0) + options + make_option(END_OF_OPTIONS))


def _block(kind: int, body: bytes) -> bytes:
    length = len(body) + 12
    return struct.pack("<II", kind, length) + body + struct.pack("<I", length)


def make_option(code: int, value: bytes = b"") -> bytes:
    """Return an option of a block."""
    return struct.pack("<HH", code, len(value)) + value + bytes(-len(value) % 4)


Heads = tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64], npt.NDArray[np.int64]]


def packet_heads(batch: DatagramBatch, rows: Indices | None, destination: Destination, options: int = 0) -> Heads:
    """Return the bytes before each payload of these n rows and behind the last, uint8, shape (n + 1, m).

    And the offsets at which it begins and ends in each line, int64, shape (n + 1,) each. The first packet's block has
    room for this many bytes of options, which go behind its payload and padding. None: all rows.
    """
    if rows is None and batch.all_ipv4:
        return _heads_of_four(batch, destination, options)
    rows = np.arange(len(batch)) if rows is None else rows
    count = len(rows)
    lengths = batch.lengths[rows]
    addresses = batch.rows["address"][rows]
    is_four = (addresses[:, :12] == np.frombuffer(V4_MAPPED, np.uint8)).all(axis=1)
    captured = lengths + np.where(is_four, 20 + UDP_SIZE, 40 + UDP_SIZE)
    padding = -captured % 4
    lines = np.zeros((count + 1, HEAD6.itemsize), np.uint8)
    heads4, heads6 = lines.view(HEAD4)[:, 0], lines.view(HEAD6)[:, 0]
    heads = heads4[:count]
    heads["type"] = ENHANCED
    heads["block_length"] = BLOCK_HEAD + captured + padding + TRAILER
    heads["block_length"][:1] += options
    heads4["trailer"][1:] = heads["block_length"]
    heads["time_high"], heads["time_low"] = batch.received_ns >> 32 & 0xFFFFFFFF, batch.received_ns & 0xFFFFFFFF
    heads["captured"] = heads["original"] = captured
    ports = batch.rows["port"][rows]
    four, six = np.flatnonzero(is_four), np.flatnonzero(~is_four)
    for of_family, some, fill in ((heads4, four, _fill_four), (heads6, six, _fill_six)):
        if len(some):
            head = of_family[:count] if len(some) == count else of_family[some]
            head["source_port"], head["port"] = ports[some], destination.port
            head["udp_length"] = UDP_SIZE + lengths[some]
            head["hop_limit"], head["protocol"] = HOP_LIMIT, UDP
            fill(head, addresses[some], destination)
            if len(some) < count:
                of_family[some] = head
    if len(six):
        heads6["udp_checksum"][six] = _checksums_of_six(batch, rows[six], heads6[six])
    begins, ends = np.full(count + 1, PAD), np.full(count + 1, PAD + TRAILER)
    begins[0] = PAD + TRAILER
    begins[1:] -= padding
    ends[:count] = BEFORE_IP + captured - lengths
    return lines, begins, ends


def _heads_of_four(batch: DatagramBatch, destination: Destination, options: int) -> Heads:
    """Do as `packet_heads` for a batch of IPv4 alone, in half the time: lines of 16 numbers, filled by column."""
    count, words = len(batch), batch.words
    template = _FOUR.copy()
    template[5], template[6] = batch.received_ns >> 32 & 0xFFFFFFFF, batch.received_ns & 0xFFFFFFFF
    template[13] = int.from_bytes(destination.four[12:], "little")
    template[14] = int.from_bytes(destination.port.to_bytes(2), "little") << 16
    lines = np.empty((count + 1, len(template)), "<u4")
    lines[:] = template
    halves = lines.view("<u2")
    length = words[:, 0] & 0xFFFF
    captured = length + (20 + UDP_SIZE)
    size = (captured + 3 & 0xFFFFFFFC) + (BLOCK_HEAD + TRAILER)
    size[0] += options
    lines[1:, 1] = lines[:-1, 3] = size
    lines[:-1, 7] = lines[:-1, 8] = captured
    halves[:-1, 19] = captured.astype(">u2").view("<u2")
    lines[:-1, 12] = words[:, 4]
    halves[:-1, 28] = (words[:, 0] >> 16).astype(">u2").view("<u2")
    halves[:-1, 30] = (length + UDP_SIZE).astype(">u2").view("<u2")
    # RFC 1071, 2(B): the sum may be taken in either byte order.
    sums = halves[:-1, 18:28].sum(axis=1, dtype=np.uint32)
    sums = (sums & 0xFFFF) + (sums >> 16)
    halves[:-1, 23] = ~((sums & 0xFFFF) + (sums >> 16)) & 0xFFFF
    begins, ends = np.empty(count + 1, np.int64), np.full(count + 1, 64)
    begins[0], begins[1:] = PAD + TRAILER, PAD - (-captured.astype(np.int64) & 3)
    ends[-1] = PAD + TRAILER
    return lines.view(np.uint8), begins, ends


_FOUR: Final = np.zeros(16, "<u4")
_FOUR[2], _FOUR[9], _FOUR[11] = ENHANCED, 0x45, UDP << 8 | HOP_LIMIT
"""The line of a packet of IPv4: padding, trailer, the seven numbers of a block's head, five of IP, two of UDP."""


def _fill_four(head: npt.NDArray[np.void], sources: npt.NDArray[np.uint8], destination: Destination) -> None:
    """Fill in the IPv4 headers of datagrams whose UDP headers are there."""
    head["version"], head["length"] = 0x45, 20 + head["udp_length"].astype(np.int64)
    head["source"], head["destination"] = sources[:, 12:], np.frombuffer(destination.four[12:], np.uint8)
    fixed = 0x4500 + (HOP_LIMIT << 8 | UDP) + sum(struct.unpack("!2H", destination.four[12:]))
    sums = head["length"].astype(np.uint32) + fixed
    sums += np.ascontiguousarray(sources[:, 12:]).view(">u2").sum(axis=1, dtype=np.uint32)
    sums = (sums & 0xFFFF) + (sums >> 16)
    head["checksum"] = ~((sums & 0xFFFF) + (sums >> 16)) & 0xFFFF  # RFC 1071


def _fill_six(head: npt.NDArray[np.void], sources: npt.NDArray[np.uint8], destination: Destination) -> None:
    """Fill in the IPv6 headers of datagrams whose UDP headers are there."""
    head["version"], head["length"] = 0x60, head["udp_length"]
    head["source"], head["destination"] = sources, np.frombuffer(destination.six, np.uint8)


def _checksums_of_six(
    batch: DatagramBatch, rows: Indices, heads: npt.NDArray[np.void]
) -> npt.NDArray[np.unsignedinteger]:
    """Return UDP checksums, which IPv6 demands (RFC 8200, 8.1), of rows whose headers are there."""
    ends = np.concatenate([heads["source"], heads["destination"]], axis=1).view(">u2").sum(axis=1, dtype=np.int64)
    rest = 2 * heads["udp_length"].astype(np.int64) + UDP + heads["source_port"] + heads["port"]
    # Sums of the bytes before each place, at even places and at odd ones.
    payload = np.frombuffer(batch.payload, np.uint8) if len(batch.payload) else np.empty(0, np.uint8)
    before = [np.concatenate([[0], np.cumsum(payload[parity::2], dtype=np.int64)]) for parity in (0, 1)]
    starts = batch.offsets[rows]
    stops = starts + batch.lengths[rows]
    even = before[0][(stops + 1) // 2] - before[0][(starts + 1) // 2]
    odd = before[1][stops // 2] - before[1][starts // 2]
    high, low = np.where(starts % 2, odd, even), np.where(starts % 2, even, odd)
    checksums: npt.NDArray[np.unsignedinteger] = (0xFFFF - (ends + rest + 256 * high + low) % 0xFFFF).astype(np.uint16)
    return checksums
