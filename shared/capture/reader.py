"""Reads the UDP datagrams of a capture: pcapng and classic pcap, of either byte order, by whatever program.

Everything in a file may be wrong. A file that does not begin as a capture is a `CaptureError`; one that is damaged
further on ends there, and `damaged` says so: a writer that was killed leaves half a block.
"""

import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Final, NamedTuple

from shared.capture.pcapng import (
    BYTE_ORDER,
    END_OF_OPTIONS,
    ENHANCED,
    IF_TSOFFSET,
    IF_TSRESOL,
    INTERFACE,
    LINKTYPE_RAW,
    OBSOLETE,
    SECTION,
    SIMPLE,
    UDP,
    UDP_SIZE,
)
from shared.net.addresses import V4_MAPPED

MAX_BLOCK: Final = 16 * 1024 * 1024
"""Bytes that a block may take; as much as Wireshark accepts."""
PCAP_MAGIC: Final = {0xA1B2C3D4: 1000, 0xA1B23C4D: 1}
"""Nanoseconds in a unit of a classic file's fraction of a second."""
ETHERNET, LINUX_COOKED, LINUX_COOKED_2 = 1, 113, 276
BEFORE_IP: Final = {LINKTYPE_RAW: 0, 12: 0, 14: 0, 228: 0, 229: 0, 0: 4, 108: 4, LINUX_COOKED: 16, LINUX_COOKED_2: 20}
"""Bytes before the IP header, by link type: raw IP under five numbers, BSD loopback under two, and Linux's own."""
VLAN_TAGS: Final = (b"\x81\x00", b"\x88\xa8", b"\x91\x00")
EXTENSIONS: Final = (0, 43, 60)
"""Headers that may stand between IPv6 and UDP (RFC 8200): hop-by-hop, routing, destination options."""
FRAGMENT: Final = 44
SECOND: Final = 1_000_000_000


class CaptureError(ValueError):
    """A file that is no capture, or of a kind that can't be read."""


class CapturedDatagram(NamedTuple):
    """A datagram: the time of its capture, source and destination as 16 packed bytes with their ports, its payload."""

    captured_ns: int
    source: bytes
    source_port: int
    destination: bytes
    port: int
    payload: bytes


class _SkipError(Exception):
    """A packet that holds no datagram to be had; its text is the cause."""


class _TornError(Exception):
    """A block that is cut short, or whose lengths can't be right."""


@dataclass(frozen=True, slots=True)
class _Interface:
    link: int
    snap_length: int
    per_second: int = 1_000_000
    offset_ns: int = 0


class CaptureReader:
    """Iterates over the datagrams of a file, in its order; CaptureError if it does not begin as a capture.

    It holds one block at a time, so the file may be of any size.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.skipped: Counter[str] = Counter()
        """Packets without a datagram that can be had, by cause."""
        self.damaged = False
        """The file ends in part of a block, or goes on in a way that can't be read."""

    def __iter__(self) -> Iterator[CapturedDatagram]:
        start = self._file.read(4)
        (little,), (big,) = struct.unpack("<I", start.ljust(4)), struct.unpack(">I", start.ljust(4))
        if little == SECTION:
            packets = self._blocks(start)
        elif little in PCAP_MAGIC or big in PCAP_MAGIC:
            packets = self._records(*(("<", little) if little in PCAP_MAGIC else (">", big)))
        else:
            raise CaptureError("it does not begin as pcapng or pcap does; expected a file that tcpdump -w wrote")
        try:
            for captured_ns, link, packet in packets:
                try:
                    source, destination, ports, payload = _parse(link, packet)
                except _SkipError as cause:
                    self.skipped[str(cause)] += 1
                else:
                    yield CapturedDatagram(captured_ns, source, ports[0], destination, ports[1], payload)
        except _TornError:
            self.damaged = True

    def _read(self, size: int) -> bytes:
        data = self._file.read(size)
        if len(data) < size:
            raise _TornError
        return data

    def _records(self, order: str, magic: int) -> Iterator[tuple[int, int, bytes]]:
        """Yield time, link type and packet of a classic file."""
        (link,) = struct.unpack(f"{order}16xI", self._read(20))
        while head := self._file.read(16):
            if len(head) < 16:
                raise _TornError
            seconds, fraction, captured, _ = struct.unpack(f"{order}4I", head)
            if captured > MAX_BLOCK:
                raise _TornError
            yield seconds * SECOND + fraction * PCAP_MAGIC[magic], link & 0xFFFF, self._read(captured)

    def _blocks(self, start: bytes) -> Iterator[tuple[int, int, bytes]]:
        """Yield time, link type and packet of a pcapng file that begins with `start`."""
        order, interfaces, now = "<", list[_Interface](), 0
        while start:
            head = start + self._read(8 - len(start))
            kind, body_start = struct.unpack(f"{order}I", head[:4])[0], b""
            if kind == SECTION:
                body_start = self._read(4)
                order = "<" if struct.unpack("<I", body_start)[0] == BYTE_ORDER else ">"
                if struct.unpack(f"{order}I", body_start)[0] != BYTE_ORDER:
                    raise _TornError
                interfaces = []
            (length,) = struct.unpack(f"{order}I", head[4:])
            if not 12 + len(body_start) <= length <= MAX_BLOCK or length % 4:
                raise _TornError
            body = body_start + self._read(length - 12 - len(body_start))
            if self._read(4) != head[4:]:
                raise _TornError
            if kind == INTERFACE:
                interfaces.append(_interface(body, order))
            elif kind in (ENHANCED, OBSOLETE, SIMPLE):
                number, ticks, packet = _packet(kind, body, order)
                if number >= len(interfaces):
                    raise _TornError
                interface = interfaces[number]
                if ticks is not None:
                    now = ticks * SECOND // interface.per_second + interface.offset_ns
                yield now, interface.link, packet[: interface.snap_length or None]
            start = self._file.read(4)


def _interface(body: bytes, order: str) -> _Interface:
    """Read an interface's block."""
    if len(body) < 8:
        raise _TornError
    link, _, snap_length = struct.unpack_from(f"{order}HHI", body)
    per_second, offset_ns, at = 1_000_000, 0, 8
    while at + 4 <= len(body):
        code, size = struct.unpack_from(f"{order}HH", body, at)
        value = body[at + 4 : at + 4 + size]
        if code == END_OF_OPTIONS:
            break
        if code == IF_TSRESOL and len(value) == 1:
            per_second = 1 << (value[0] & 0x7F) if value[0] & 0x80 else 10 ** value[0]
        if code == IF_TSOFFSET and len(value) == 8:
            offset_ns = struct.unpack(f"{order}q", value)[0] * SECOND
        at += 4 + size + -size % 4
    return _Interface(link, snap_length, per_second, offset_ns)


def _packet(kind: int, body: bytes, order: str) -> tuple[int, int | None, bytes]:
    """Read a packet's block: the number of its interface, its time in units of that, None for none, and its bytes."""
    if kind == SIMPLE:
        if len(body) < 4:
            raise _TornError
        (original,) = struct.unpack_from(f"{order}I", body)
        return 0, None, body[4 : 4 + original]
    if len(body) < 20:
        raise _TornError
    number, high, low, captured, _ = struct.unpack_from(f"{order}5I" if kind == ENHANCED else f"{order}H2x4I", body)
    if captured > len(body) - 20:
        raise _TornError
    return number, high << 32 | low, body[20 : 20 + captured]


def _parse(link: int, packet: bytes) -> tuple[bytes, bytes, tuple[int, int], bytes]:
    """Return source, destination, their ports and the payload of the datagram in a packet."""
    if link == ETHERNET:
        at = 14
        while packet[at - 2 : at] in VLAN_TAGS:
            at += 4
        if packet[at - 2 : at] not in (b"\x08\x00", b"\x86\xdd"):
            raise _SkipError("no IP")
    elif link in BEFORE_IP:
        at = BEFORE_IP[link]
    else:
        raise _SkipError(f"link type {link}")
    version = packet[at] >> 4 if len(packet) > at else 0
    if version == 4 and len(packet) >= at + 20:
        source, destination = V4_MAPPED + packet[at + 12 : at + 16], V4_MAPPED + packet[at + 16 : at + 20]
        protocol, is_fragment = packet[at + 9], packet[at + 6] & 0x3F or packet[at + 7]
        at += max(20, (packet[at] & 0xF) * 4)
    elif version == 6 and len(packet) >= at + 40:
        source, destination = packet[at + 8 : at + 24], packet[at + 24 : at + 40]
        protocol, at = packet[at + 6], at + 40
        while protocol in EXTENSIONS and len(packet) >= at + 8:
            protocol, at = packet[at], at + 8 * (packet[at + 1] + 1)
        is_fragment = protocol == FRAGMENT
    else:
        raise _SkipError("no IP")
    if is_fragment:
        raise _SkipError("a fragment")
    if protocol != UDP:
        raise _SkipError("no UDP")
    if len(packet) < at + UDP_SIZE:
        raise _SkipError("cut at its capture")
    source_port, port, length, _ = struct.unpack_from("!4H", packet, at)
    if length < UDP_SIZE:
        raise _SkipError("no UDP")
    if len(packet) < at + length:
        raise _SkipError("cut at its capture")
    return source, destination, (source_port, port), packet[at + UDP_SIZE : at + length]
