"""Few datagrams as blocks of pcapng, one by one: up to some tens, arrays take longer to set up. No I/O.

The bytes are those that `packet_heads` makes.
"""

import struct
from collections.abc import Iterator
from typing import Final

from shared.capture.pcapng import (
    BLOCK_HEAD,
    ENHANCED,
    HEADERS4,
    HEADERS6,
    HOP_LIMIT,
    TRAILER,
    UDP,
    UDP_SIZE,
    Destination,
)
from shared.net.addresses import V4_MAPPED

FEW_PACKETS: Final = 96
"""So many are as soon made one by one as arrays are set up for them."""
_ROW: Final = struct.Struct("<HH12s4s")
"""Length, port, and the two parts of an address, by the first of which IPv4 is told."""
_BLOCK: Final = struct.Struct("<7I")
_FOUR: Final = struct.Struct(">BxHxxxxBBH4s4sHHHxx")
_SIX: Final = struct.Struct(">BxxxHBB16s16sHHHH")
_PADDING: Final = [bytes(count) for count in range(4)]


def captured_lengths(rows: bytes) -> list[int]:
    """Return the length of each packet, with its headers; `rows` are those of a batch as bytes."""
    return [length + (HEADERS4 if prefix == V4_MAPPED else HEADERS6) for length, _, prefix, _ in _ROW.iter_unpack(rows)]


def packet_parts(
    rows: bytes, payload: bytes | memoryview, received_ns: int, destination: Destination, options: bytes = b""
) -> Iterator[bytes | memoryview]:
    """Yield the blocks of a batch in parts; its payloads stand end to end. `options` go into the first block."""
    high, low, at, more = received_ns >> 32 & 0xFFFFFFFF, received_ns & 0xFFFFFFFF, 0, len(options)
    four, six, port = destination.four[12:], destination.six, destination.port
    fixed4 = 0x4500 + (HOP_LIMIT << 8 | UDP) + int.from_bytes(four)
    fixed6 = UDP + port + int.from_bytes(six)
    for length, source_port, prefix, last in _ROW.iter_unpack(rows):
        stop, udp = at + length, UDP_SIZE + length
        if prefix == V4_MAPPED:
            captured = 20 + udp
            # A number of 16-bit digits has the remainder of their sum (RFC 1071).
            checksum = -(fixed4 + captured + int.from_bytes(last)) % 0xFFFF
            header = _FOUR.pack(0x45, captured, HOP_LIMIT, UDP, checksum, last, four, source_port, port, udp)
        else:
            captured, source = 40 + udp, prefix + last
            data = int.from_bytes(payload[at:stop]) << (8 * (length & 1))
            checksum = 0xFFFF - (fixed6 + 2 * udp + source_port + int.from_bytes(source) + data) % 0xFFFF
            header = _SIX.pack(0x60, udp, UDP, HOP_LIMIT, source, six, source_port, port, udp, checksum)
        size = BLOCK_HEAD + (captured + 3 & ~3) + more + TRAILER
        yield _BLOCK.pack(ENHANCED, size, 0, high, low, captured, captured) + header
        yield payload[at:stop]
        yield _PADDING[-captured & 3] + options + size.to_bytes(4, "little")
        at, more, options = stop, 0, b""
