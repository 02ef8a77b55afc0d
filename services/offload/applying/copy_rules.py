"""The instructions that make copies of a datagram, and leave the datagram as it was. No I/O."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Final

from services.offload.applying.nftables.expressions import (
    R0,
    Base,
    Checksum,
    bitwise,
    count,
    duplicate,
    forward,
    immediate,
    load,
    store,
    take_one_in,
)
from services.offload.kernel_plan import Copy

REGISTER: Final = 4
"""Bytes of a register."""
REGISTERS: Final = 16
TRAFFIC_CLASS: Final = b"\xf0\x0f"
"""The bits of the first two bytes of IPv6 that are not the traffic class."""


@dataclass(frozen=True, slots=True)
class _Field:
    """Bytes of a header that copies change: `saved` is the register that keeps those of the datagram."""

    base: Base
    offset: int
    length: int
    saved: int
    checksum: Checksum = Checksum.NONE

    def save(self) -> bytes:
        return load(self.base, self.offset, self.length, R0 + self.saved)

    def restore(self) -> bytes:
        return store(self.base, self.offset, self.length, R0 + self.saved, self.checksum)

    def write(self, value: bytes, spare: int, at: int = 0) -> bytes:
        """Write a value, in pieces that fit into the registers from `spare` on."""
        room, written = (REGISTERS - spare) * REGISTER, []
        for begin in range(0, len(value), room):
            piece = value[begin : begin + room]
            written.append(immediate(R0 + spare, piece))
            written.append(store(self.base, self.offset + at + begin, len(piece), R0 + spare, self.checksum))
        return b"".join(written)


@dataclass(frozen=True, slots=True)
class _Layout:
    """The changed fields of an IP version. Registers from `spare` on are free for values."""

    macs: _Field
    first: _Field
    hops: _Field
    addresses: _Field
    ports: _Field
    spare: int
    most: int
    """Copies that one rule can make: the kernel takes 127 instructions."""

    @property
    def fields(self) -> tuple[_Field, ...]:
        return self.macs, self.first, self.hops, self.addresses, self.ports


PORTS: Final = (Base.TRANSPORT, 0, 4)
LAYOUTS: Final = {
    # `first`: version and header length, then type of service. `hops`: time to live, then protocol.
    4: _Layout(
        _Field(Base.LINK, 0, 12, 0),
        _Field(Base.NETWORK, 0, 2, 3, Checksum.IPV4_HEADER),
        _Field(Base.NETWORK, 8, 2, 4, Checksum.IPV4_HEADER),
        _Field(Base.NETWORK, 12, 8, 5, Checksum.BOTH),
        _Field(*PORTS, 7, Checksum.UDP),
        8,
        8,
    ),
    # `first`: version, traffic class and the beginning of the flow label. `hops`: next header, then hop limit.
    6: _Layout(
        _Field(Base.LINK, 0, 12, 0),
        _Field(Base.NETWORK, 0, 2, 3),
        _Field(Base.NETWORK, 6, 2, 4),
        _Field(Base.NETWORK, 8, 32, 5, Checksum.UDP),
        _Field(*PORTS, 13, Checksum.UDP),
        14,
        5,
    ),
}
UDP: Final = 17


def version_of(copy: Copy) -> int:
    """Return the IP version of a copy."""
    return 4 if len(copy.address) == 4 else 6


def most_in_a_rule(version: int) -> int:
    """Return the number of copies that one rule can make."""
    return LAYOUTS[version].most


def make_copies(copies: Sequence[Copy], counter_of: dict[int, str], phase: int = 0, *, use_up: bool = False) -> bytes:
    """Return the instructions for copies of one IP version; one that samples, at `phase`, is alone.

    Those of the exporter's own address come first: a relay's address is taken back only behind the last. With `use_up`
    nobody wants the datagram afterwards: it becomes the last copy itself.
    """
    layout = LAYOUTS[version_of(copies[0])]
    made = [take_one_in(copies[0].sample, phase, R0)] if copies[0].sample > 1 else []
    made.append(_save(version_of(copies[0])))
    before: Copy | None = None
    for copy in sorted(copies, key=lambda each: bool(each.source)):
        made.append(_write_headers(layout, copy, before))
        made.append(count(counter_of[copy.counter]))
        made.append(duplicate(copy.link_index, R0 + layout.spare))
        before = copy
    if use_up and before:
        made[-1] = forward(before.link_index, R0 + layout.spare)
    else:
        made.append(_restore(version_of(copies[0])))
    return b"".join(made)


@cache
def _save(version: int) -> bytes:
    return b"".join(field.save() for field in LAYOUTS[version].fields)


@cache
def _restore(version: int) -> bytes:
    return b"".join(field.restore() for field in LAYOUTS[version].fields)


def _write_headers(layout: _Layout, copy: Copy, before: Copy | None) -> bytes:
    """Return what gives the packet the headers of a copy, where those of the copy before it differ."""
    spare, half = layout.spare, layout.addresses.length // 2
    written = []
    if before is None or (before.address, before.source) != (copy.address, copy.source):
        if copy.source:
            written.append(layout.addresses.write(copy.source + copy.address, spare))
        else:
            written.append(layout.addresses.write(copy.address, spare, at=half))
    if before is None or (before.port, before.source_port) != (copy.port, copy.source_port):
        port = copy.port.to_bytes(2, "big")
        if copy.source:
            written.append(layout.ports.write(copy.source_port.to_bytes(2, "big") + port, spare))
        else:
            written.append(layout.ports.write(port, spare, at=2))
    if before is None or before.hop_limit != copy.hop_limit:
        hops = bytes((copy.hop_limit, UDP) if half == 4 else (UDP, copy.hop_limit))
        written.append(layout.hops.write(hops, spare))
    if before is None or before.dscp != copy.dscp:
        written.append(_write_dscp(layout, copy.dscp, ipv4=half == 4))
    if before is None or (before.next_hop, before.link_address) != (copy.next_hop, copy.link_address):
        written.append(layout.macs.write(copy.next_hop + copy.link_address, spare))
    return b"".join(written)


def _write_dscp(layout: _Layout, dscp: int, *, ipv4: bool) -> bytes:
    if ipv4:
        return layout.first.write(bytes((0x45, dscp << 2)), layout.spare)
    first, spare = layout.first, R0 + layout.spare
    marked = bitwise(R0 + first.saved, spare, TRAFFIC_CLASS, (dscp << 6).to_bytes(2, "big"))
    return marked + store(first.base, first.offset, first.length, spare)
