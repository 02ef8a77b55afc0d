"""The format of netlink(7) messages, where pyroute2 knows none or loads too much for it. No I/O."""

import struct
from collections.abc import Iterator, Mapping
from typing import Final

RECEIVE_SIZE: Final = 1 << 17
"""Bytes: the kernel sends an answer in pieces that are no longer."""
KERNEL: Final = (0, 0)
NLM_F_REQUEST: Final = 1
NLM_F_DUMP: Final = 0x300
ENDS: Final = (2, 3)
"""Kinds of a message after which no answer comes: NLMSG_ERROR, NLMSG_DONE."""
HEADER: Final = struct.Struct("=IHHII")
"""struct nlmsghdr: length, type, flags, sequence, port."""
ATTRIBUTE: Final = struct.Struct("=HH")
NESTED: Final = 0x3FFF
"""The bits of an attribute's type without NLA_F_NESTED and NLA_F_NET_BYTEORDER."""

Attributes = Mapping[int, bytes]


def request(kind: int, flags: int, sequence: int, body: bytes) -> bytes:
    """Return a request."""
    return HEADER.pack(HEADER.size + len(body), kind, NLM_F_REQUEST | flags, sequence, 0) + body


def messages(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Yield kind, sequence and body of each message that was received together."""
    at = 0
    while at + HEADER.size <= len(data):
        size, kind, _, sequence, _ = HEADER.unpack_from(data, at)
        yield kind, sequence, data[at + HEADER.size : at + size]
        at += max(size, HEADER.size) + 3 & ~3


def attributes(data: bytes) -> Attributes:
    """Return the attributes that stand one behind the other, by type."""
    found, at = {}, 0
    while at + ATTRIBUTE.size <= len(data):
        size, kind = ATTRIBUTE.unpack_from(data, at)
        found[kind & NESTED] = data[at + ATTRIBUTE.size : at + size]
        at += max(size, ATTRIBUTE.size) + 3 & ~3
    return found
