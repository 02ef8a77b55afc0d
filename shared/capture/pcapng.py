"""Datagrams as blocks of pcapng, the columns of batches at a time. No I/O.

A batch knows no headers, so they are made up: IP and UDP with the exporter's address and port, and the destination
that the interface was given. The checksums are right, except that UDP over IPv4 has none (RFC 768 allows it). All is
little-endian; draft-ietf-opsawg-pcapng has the format.
"""

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from shared.datagrams.batch import Indices
from shared.datagrams.gathered import Gathered, Words
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
MASK: Final = (1 << 64) - 1
UNKNOWN4, UNKNOWN6 = V4_MAPPED + bytes(4), bytes(16)
"""The unspecified addresses, as a destination that is not known."""

PAD, TRAILER, BLOCK_HEAD = 4, 4, 28
"""Bytes of a block behind its packet, of which at most three are padding, and before it."""


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


AT_IP: Final = 9
LINE4, LINE6 = AT_IP + 7, AT_IP + 12
"""Words of four bytes between two payloads. One block ends with padding and its length once more. The next one begins
with seven words, the IP header, and the two words of the UDP header."""
HEADERS4, HEADERS6 = 20 + UDP_SIZE, 40 + UDP_SIZE
"""Bytes of the headers in a packet."""
Lengths = npt.NDArray[np.integer]


class Packets:
    """Datagrams as packets: `words` are as in `DatagramBatch`, shape (n, 5), `captured` the lengths of the packets.

    `six` tells which sources are IPv6, bool, shape (n,); None: none is. `payloads` are places in memory, as in
    `Gathered`. `padded`, like `captured` uint32 of shape (n,), is the length with the padding behind it.
    """

    def __init__(self, gathered: Gathered, rows: Indices | None = None) -> None:
        self.gathered = gathered
        self.words, self.payloads = gathered.words, gathered.pointers
        self.six = None if gathered.all_ipv4 else ~gathered.ipv4
        if rows is not None:
            self.words, self.payloads = self.words[rows], self.payloads[rows]
            self.six = None if self.six is None else self.six[rows]
        self._rows = rows
        self.lengths = self.words[:, 0] & 0xFFFF
        self.captured = self.lengths + HEADERS4
        if self.six is not None:
            self.captured[self.six] += HEADERS6 - HEADERS4
        self.padded = self.captured + 3 & 0xFFFFFFFC

    def times(self) -> Words:
        """Times of receipt as two numbers each, the upper half first: shape (n, 2), or (1, 2) for a single batch."""
        batches = self.gathered.batches
        times = np.array([divmod(each.received_ns & MASK, 1 << 32) for each in batches], "<u4")
        return times if len(batches) == 1 else np.repeat(times, [len(each) for each in batches], axis=0)

    def sums(self, some: Indices) -> npt.NDArray[np.int64]:
        """Return the sum of some payloads as numbers of two bytes, less multiples of 65535."""
        payloads = self.gathered.payloads(some if self._rows is None else self._rows[some])
        # 65536 is 1 modulo 65535, so a number has the same remainder as the sum of its digits.
        return np.array([int.from_bytes(each + bytes(len(each) & 1)) % 0xFFFF for each in payloads], np.int64)


class First(NamedTuple):
    """A packet with options: its row, payload, padding and options in one, and the bytes of the options."""

    row: int
    start: bytes
    options: int


class Heads(NamedTuple):
    """The bytes before each of n payloads and behind the last: a line each, of which `begins` to `ends` are meant.

    `lines` are uint32, shape (n + 1, m), the others int64, shape (n + 1,).
    """

    lines: Words
    begins: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]


def packet_heads(packets: Packets, destination: Destination, firsts: Iterable[First]) -> Heads:
    """Return the blocks of packets but for their payloads, and for the options of `firsts`."""
    count, six, captured = len(packets.words), packets.six, packets.captured
    lines = np.empty((count + 1, LINE4 if six is None else LINE6), "<u4")
    lines[:, :LINE4] = _template4(destination)
    lines[:-1, 5:7] = packets.times()
    sizes = packets.padded + (BLOCK_HEAD + TRAILER)
    begins, ends = np.empty(count + 1, np.int64), np.empty(count + 1, np.int64)
    begins[1:] = captured - packets.padded + PAD
    for first in firsts:
        sizes[first.row] += first.options
        begins[first.row + 1] = PAD
    lines[1:, 1] = lines[:-1, 3] = sizes
    lines[:-1, 7] = lines[:-1, 8] = captured
    ends.fill(4 * LINE4)
    begins[0] = ends[-1] = PAD + TRAILER
    if six is None:
        _fill_four(lines[:-1, AT_IP:], packets.words, captured, destination)
        return Heads(lines, begins, ends)
    for some, fill in ((np.flatnonzero(~six), _fill_four), (np.flatnonzero(six), _fill_six)):
        headers = lines[some, AT_IP:]
        fill(headers, packets.words[some], captured[some], destination)
        if fill is _fill_six:
            _fill_checksums(headers.view(">u2"), packets.sums(some))
        lines[some, AT_IP:] = headers
    ends[:-1][six] = 4 * LINE6
    return Heads(lines, begins, ends)


@lru_cache(16)
def _template4(destination: Destination) -> Words:
    """Return a line with what is the same in all packets of IPv4."""
    block = struct.pack("<9I", 0, 0, ENHANCED, 0, 0, 0, 0, 0, 0)
    head = 0x45, 0, HOP_LIMIT, UDP, destination.four[12:], destination.port
    return np.frombuffer(block + struct.pack(">BxHxxxxBBxxxxxx4sxxHxxxx", *head), "<u4")


def _fill_four(headers: Words, words: Words, captured: Lengths, destination: Destination) -> None:
    """Fill in the headers of IPv4 and UDP, which have what is the same in all."""
    digits = headers.view(">u2")
    headers[:, 3] = words[:, 4]
    digits[:, 1] = captured
    digits[:, 10] = words[:, 0] >> 16
    digits[:, 12] = captured - 20
    fixed = 0x4500 + (HOP_LIMIT << 8 | UDP) + int.from_bytes(destination.four[12:]) % 0xFFFF
    # RFC 1071: the complement of the sum, in 16 bits with the carry added to it.
    digits[:, 5] = (8 * 0xFFFF - fixed - captured - digits[:, 6] - digits[:, 7]) % 0xFFFF


def _fill_six(headers: Words, words: Words, captured: Lengths, destination: Destination) -> None:
    """Fill in the headers of IPv6 and UDP, without the checksum."""
    digits, port = headers.view(">u2"), destination.port
    head = 0x60, UDP, HOP_LIMIT, destination.six, port
    headers[:] = np.frombuffer(struct.pack(">BxxxxxBB16x16sxxHxxxx", *head), "<u4")
    headers[:, 2:6] = words[:, 1:]
    digits[:, 20] = words[:, 0] >> 16
    digits[:, 2] = digits[:, 22] = captured - 40


def _fill_checksums(digits: npt.NDArray[np.uint16], sums: npt.NDArray[np.int64]) -> None:
    """Fill in the checksums of UDP, which IPv6 demands (RFC 8200, 8.1), with the sums of the payloads."""
    sums = sums + digits[:, 4:23].sum(axis=1, dtype=np.int64) + digits[:, 22] + UDP
    digits[:, 23] = 0xFFFF - sums % 0xFFFF
