"""Netlink attributes: a length, a kind and a value, one behind the other, each at a multiple of 4 bytes. No I/O.

Numbers are in network order (NFPROTO messages), unless a function says otherwise.
"""

import struct
from collections.abc import Iterator
from typing import Final

HEADER: Final = struct.Struct("=HH")
"""struct nlattr: length with this header, and kind (linux/netlink.h)."""
NESTED: Final = 0x8000
KIND: Final = 0x3FFF
"""The bits of a kind without NLA_F_NESTED and NLA_F_NET_BYTEORDER."""


def attribute(kind: int, value: bytes) -> bytes:
    """Return an attribute.

    >>> attribute(2, b"abc").hex(" ")
    '07 00 02 00 61 62 63 00'
    """
    return HEADER.pack(HEADER.size + len(value), kind) + value + bytes(-len(value) % 4)


def nested(kind: int, *attributes: bytes) -> bytes:
    """Return an attribute that holds others."""
    value = b"".join(attributes)
    return HEADER.pack(HEADER.size + len(value), kind | NESTED) + value


def number(kind: int, value: int) -> bytes:
    """Return an attribute with a 32-bit number; -1 and its like are taken as the kernel's u32."""
    return HEADER.pack(8, kind) + (value & 0xFFFFFFFF).to_bytes(4, "big")


def text(kind: int, value: str) -> bytes:
    """Return an attribute with a text that ends in NUL."""
    return attribute(kind, value.encode() + b"\0")


def read(data: bytes) -> Iterator[tuple[int, bytes]]:
    r"""Yield kind and value of each attribute; ValueError where the bytes are none.

    >>> [*read(attribute(2, b"abc") + number(1, 7))]
    [(2, b'abc'), (1, b'\x00\x00\x00\\x07')]
    """
    at = 0
    while at + HEADER.size <= len(data):
        length, kind = HEADER.unpack_from(data, at)
        if not HEADER.size <= length <= len(data) - at:
            raise ValueError(f"attribute of {length} bytes in {len(data) - at}")
        yield kind & KIND, data[at + HEADER.size : at + length]
        at += length + 3 & ~3
