"""The instructions of rules, as attributes: they move bytes between registers and a packet, compare, and act. No I/O.

There are 16 registers of 4 bytes, R0 to R15; a longer value takes several in a row. A rule ends at the first comparison
that fails, and begins with registers of unknown content.
"""

import struct
from enum import IntEnum
from functools import lru_cache
from typing import Final

from services.offload.applying.nftables.attributes import attribute, nested, number, text

R0: Final = 8
"""NFT_REG32_00; the others follow it."""
VERDICT: Final = 0
"""The register whose content decides what comes next."""
LIST_ELEMENT: Final = 1
KEPT: Final = 256
"""Instructions that are kept once made: thousands of copies have the same ones."""
MAP_NAME: Final = "__map%d"
"""The name of a map that belongs to one rule: the kernel puts a number in."""


class Base(IntEnum):
    """The header that an offset counts from."""

    LINK = 0
    NETWORK = 1
    TRANSPORT = 2


class Op(IntEnum):
    """A comparison."""

    EQUAL = 0
    NOT_EQUAL = 1
    GREATER = 4


class Meta(IntEnum):
    """A fact that the kernel knows of a packet beside its bytes."""

    MARK = 3
    PROTOCOL = 16
    PACKET_TYPE = 19


class Verdict(IntEnum):
    """The way on: out of the chains, or to another chain."""

    DROP = 0
    ACCEPT = 1
    JUMP = -3
    GOTO = -4


class Checksum(IntEnum):
    """The checksums that follow a change of a header: none, the one of the IPv4 header, that of UDP, or both.

    The UDP checksum is left alone where it is 0: the datagram has none.
    """

    NONE = 0
    IPV4_HEADER = 1
    UDP = 2
    BOTH = 3


IPV4_CHECKSUM: Final = 10
"""Its offset in the header."""


def _expression(name: str, *attributes: bytes) -> bytes:
    return nested(LIST_ELEMENT, text(1, name), nested(2, *attributes))


def _value(kind: int, value: bytes) -> bytes:
    return nested(kind, attribute(1, value))


@lru_cache(maxsize=KEPT)
def load(base: Base, offset: int, length: int, register: int) -> bytes:
    """Read bytes of a header into registers; the rest of the last one is 0."""
    return _expression("payload", number(1, register), number(2, base), number(3, offset), number(4, length))


@lru_cache(maxsize=KEPT)
def store(base: Base, offset: int, length: int, register: int, checksum: Checksum = Checksum.NONE) -> bytes:
    """Write bytes of registers into a header, and correct checksums by the difference."""
    inet = bool(checksum & Checksum.IPV4_HEADER)
    return _expression(
        "payload",
        number(5, register),
        number(2, base),
        number(3, offset),
        number(4, length),
        number(6, int(inet)),
        number(7, IPV4_CHECKSUM if inet else 0),
        number(8, int(bool(checksum & Checksum.UDP))),
    )


def immediate(register: int, value: bytes) -> bytes:
    """Set registers to a value."""
    return _before_value(register, len(value)) + value + bytes(-len(value) % 4)


@lru_cache(maxsize=KEPT)
def _before_value(register: int, size: int) -> bytes:
    """Return the beginning of an `immediate`, which ends in its value: all those of one size have the same."""
    return _expression("immediate", number(1, register), _value(2, bytes(size)))[: -(size + 3 & ~3)]


def compare(register: int, value: bytes, op: Op = Op.EQUAL) -> bytes:
    """End the rule unless registers compare to a value, as bytes."""
    return _expression("cmp", number(1, register), number(2, op), _value(3, value))


def bitwise(source: int, target: int, mask: bytes, xor: bytes) -> bytes:
    """Set registers to those of others, and-ed with a mask, then xor-ed."""
    return _expression(
        "bitwise", number(1, source), number(2, target), number(3, len(mask)), _value(4, mask), _value(5, xor)
    )


def load_meta(key: Meta, register: int) -> bytes:
    """Read a fact about a packet, in the host's byte order."""
    return _expression("meta", number(2, key), number(1, register))


def store_meta(key: Meta, register: int) -> bytes:
    """Set a fact about a packet."""
    return _expression("meta", number(2, key), number(3, register))


def take_one_in(modulus: int, phase: int, register: int) -> bytes:
    """End the rule but for one in `modulus` packets: the kernel counts those that come here."""
    counted = _expression("numgen", number(1, register), number(2, modulus), number(3, 0), number(4, 0))
    return counted + compare(register, struct.pack("=I", phase))


def hash_values(source: int, length: int, target: int, modulus: int) -> bytes:
    """Set a register to a number below `modulus`, by `jhash` with initval 0 (linux/jhash.h) of bytes in others."""
    return _expression(
        "hash", number(1, source), number(2, target), number(3, length), number(4, modulus), number(5, 0), number(7, 0)
    )


def look_up(register: int, identity: int) -> bytes:
    """Do what a map says of the registers' value; end the rule where it says nothing."""
    return _expression("lookup", number(2, register), number(3, VERDICT), text(1, MAP_NAME), number(4, identity))


def count(name: str) -> bytes:
    """Count the packet by a counter of the table."""
    return _expression("objref", number(1, 1), text(2, name))


@lru_cache(maxsize=KEPT)
def duplicate(link_index: int, register: int) -> bytes:
    """Send a copy of the frame, as it is now, by a link."""
    return immediate(register, struct.pack("=I", link_index)) + _expression("dup", number(2, register))


@lru_cache(maxsize=KEPT)
def forward(link_index: int, register: int) -> bytes:
    """Send the frame itself by a link: for the chains it is gone."""
    return immediate(register, struct.pack("=I", link_index)) + _expression("fwd", number(1, register))


def decide(verdict: Verdict, chain: str = "") -> bytes:
    """Go on as a verdict says."""
    return _expression("immediate", number(1, VERDICT), nested(2, verdict_data(verdict, chain)))


def verdict_data(verdict: Verdict, chain: str = "") -> bytes:
    """Return a verdict as data, of a rule or of a map's element."""
    return nested(2, number(1, verdict), text(2, chain) if chain else b"")
