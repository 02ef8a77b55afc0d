"""Headers before a payload on the wire, as columns: Ethernet, IPv4, IPv6 and UDP, and their checksums.

One structured row a frame. In front of it is the kernel's `virtio_net_hdr`, which AF_PACKET takes with PACKET_VNET_HDR
(packet(7)). It says where the UDP checksum is to be completed, and at what length a run of datagrams is to be cut. No
I/O.
"""

from typing import Final

import numpy as np
import numpy.typing as npt

from shared.datagrams.batch import Indices
from shared.datagrams.gathered import Gathered

ETHERTYPE_IPV4: Final = 0x0800
ETHERTYPE_IPV6: Final = 0x86DD
UDP: Final = 17
UDP_SIZE: Final = 8
IP_SIZE: Final = {4: 20, 6: 40}
FRAGMENT: Final = 44
"""Next-header number of IPv6's fragment header (RFC 8200, 4.5), which has 8 bytes."""
FRAGMENT_SIZE: Final = 8
MORE_FRAGMENTS: Final = 0x2000
"""IPv4's flag, in the same 16 bits as the offset in units of 8 bytes (RFC 791, 3.1)."""

NEEDS_CSUM: Final = 1
GSO_NONE: Final = 0
GSO_UDP_L4: Final = 5
"""virtio_net_hdr (linux/virtio_net.h); AF_PACKET takes UDP_L4 since Linux 6.2."""

_LINK: Final = [
    ("flags", "u1"),
    ("gso_type", "u1"),
    ("header_length", "u2"),
    ("gso_size", "u2"),
    ("csum_start", "u2"),
    ("csum_offset", "u2"),
    ("ethernet", "V14"),
]
_UDP: Final = [("source_port", ">u2"), ("port", ">u2"), ("udp_length", ">u2"), ("udp_checksum", ">u2")]
HEADERS4: Final = np.dtype([
    *_LINK,
    ("version", "u1"),
    ("traffic_class", "u1"),
    ("length", ">u2"),
    ("identification", ">u2"),
    ("fragment", ">u2"),
    ("hop_limit", "u1"),
    ("protocol", "u1"),
    ("checksum", ">u2"),
    ("source", "V4"),
    ("destination", "V4"),
    *_UDP,
])  # fmt: skip
HEADERS6: Final = np.dtype([
    *_LINK,
    ("flow", ">u4"),
    ("length", ">u2"),
    ("protocol", "u1"),
    ("hop_limit", "u1"),
    ("source", "V16"),
    ("destination", "V16"),
    *_UDP,
    ("room", "V8"),
])  # fmt: skip
"""`flow` is version, traffic class and flow label; `room` takes the bytes that a fragment header pushes back."""
VNET_SIZE: Final = 10
LINK_HEADER: Final = 14
LINK_SIZE: Final = VNET_SIZE + LINK_HEADER
assert (HEADERS4.itemsize, HEADERS6.itemsize) == (LINK_SIZE + 28, LINK_SIZE + 48 + FRAGMENT_SIZE)

FRAGMENT_HEADER: Final = np.dtype([("next", "u1"), ("reserved", "u1"), ("offset", ">u2"), ("identification", ">u4")])
assert FRAGMENT_HEADER.itemsize == FRAGMENT_SIZE

Headers = npt.NDArray[np.void]
Sums = npt.NDArray[np.uint32]


def fold(sums: Sums) -> Sums:
    """Return one's complement sums of up to 32 bits in 16 bits each (RFC 1071)."""
    sums = (sums & 0xFFFF) + (sums >> 16)
    folded: Sums = (sums & 0xFFFF) + (sums >> 16)
    return folded


def complete(sums: Sums) -> Sums:
    """Return the UDP checksums for folded sums: inverted, and never 0, which would mean none (RFC 768)."""
    inverted = sums ^ np.uint32(0xFFFF)
    inverted[inverted == 0] = 0xFFFF
    return inverted


def sum_payloads(batch: Gathered, rows: Indices) -> Sums:
    """Return for each row a number equal to the sum of its payload's 16-bit words modulo 65535, uint32, shape (n,)."""
    size = int(batch.lengths[0])
    if size and size % 2 == 0 and (batch.lengths == size).all() and not any(each.stride % 2 for each in batch.batches):
        payloads = [np.frombuffer(each.payload, ">u2").reshape(len(each), -1)[:, : size // 2] for each in batch.batches]
        equal: Sums = np.concatenate([words.sum(axis=1, dtype=np.uint32) for words in payloads])[rows]
        return fold(equal)
    # Modulo 65535 a string of bytes read as one number is the sum of its words, since 65536 is 1: CPython does that in
    # one go, faster than numpy can gather rows of different lengths.
    sums = [(int.from_bytes(payload) << 8 * (len(payload) & 1)) % 0xFFFF for payload in batch.payloads(rows)]
    return np.array(sums, np.uint32)


def sum_addresses(packed: npt.NDArray[np.uint8]) -> Sums:
    """Return the sum of the 16-bit words of each packed address, shape (n, 4) or (n, 16)."""
    words: Sums = packed.view(">u2").sum(axis=1, dtype=np.uint32)
    return words
