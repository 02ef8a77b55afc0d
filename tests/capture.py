"""The tests' own eyes, with nothing of the product in them: frames decoded and verified as they came, and datagrams."""

import mmap
import select
import socket
import struct
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from itertools import pairwise
from typing import Final, Generic, NamedTuple, Self, TypeVar

from tests.network import Host
from tests.stack import PATIENCE_SECONDS

ETH_P_ALL, ETH_P_IP, ETH_P_IPV6, ARPHRD_ETHER, IPV6_FRAGMENT = 0x0003, 0x0800, 0x86DD, 1, 44
SOL_PACKET, PACKET_RX_RING, PACKET_STATISTICS, PACKET_VERSION = 263, 5, 6, 10  # linux/if_packet.h
PACKET_VNET_HDR, PACKET_IGNORE_OUTGOING, TPACKET_V2, TP_STATUS_USER, TP_STATUS_CSUMNOTREADY = 15, 23, 1, 1, 8
SLOT: Final = struct.Struct("=IIIHH16xHHiH")  # tpacket2_hdr: status, length, captured, frame, packet; sockaddr_ll
BLOCK, RING, SO_RCVBUFFORCE = 1 << 18, 1 << 25, 33  # bytes, bytes; asm-generic/socket.h
T = TypeVar("T", bound="Arrival")


@dataclass(frozen=True)
class Header:
    """An IP header; the identification of IPv6 is the fragment header's, None without one."""

    source: str
    destination: str
    protocol: int
    hop_limit: int
    traffic_class: int
    flow_label: int
    identification: int | None
    dont_fragment: bool


class Packet(NamedTuple):
    """A whole packet or a fragment; `offset` is the place of `body`, in bytes."""

    header: Header
    offset: int
    more: bool
    body: bytes


@dataclass(frozen=True)
class Arrival:
    """A datagram as a collector sees it."""

    source: str
    source_port: int
    payload: bytes


@dataclass(frozen=True)
class Datagram(Arrival):
    """A datagram as it came over the wire, whole; a `partial` checksum is left for a network card to compute."""

    port: int
    header: Header
    fragments: int
    macs: tuple[str, str]
    partial: bool


def ones_sum(data: bytes) -> int:
    """The one's complement sum of RFC 1071, where 0 stands for 65,535 too: what a right checksum makes of it."""
    return int.from_bytes(data + bytes(len(data) % 2)) % 0xFFFF


def parse_ipv4(data: bytes) -> Packet:
    """RFC 791; anything wrong is an AssertionError."""
    first, tos, total, identification, cut, ttl, protocol = struct.unpack_from("!BBHHHBB", data)
    size = (first & 15) * 4
    assert 20 <= size <= total <= len(data), f"wrong length in an IPv4 header: {data[:20].hex()}"
    assert len(data) <= max(total, 46), f"{len(data) - total} bytes behind the packet"  # Ethernet pads to 46
    assert ones_sum(data[:size]) == 0, f"wrong IPv4 header checksum: {data[:size].hex()}"
    assert first >> 4 == 4, "not IPv4"
    assert not cut & 0x8000, "the reserved flag is set"
    source, destination = str(IPv4Address(data[12:16])), str(IPv4Address(data[16:20]))
    header = Header(source, destination, protocol, ttl, tos, 0, identification, bool(cut & 0x4000))
    return Packet(header, (cut & 0x1FFF) * 8, bool(cut & 0x2000), data[size:total])


def parse_ipv6(data: bytes) -> Packet:
    """RFC 8200, with no extension header but the one for fragments; anything wrong is an AssertionError."""
    word, length, protocol, hop_limit = struct.unpack_from("!IHBB", data)
    assert word >> 28 == 6, "not IPv6"
    assert len(data) == 40 + length, f"payload length {length}, but {len(data) - 40} bytes"
    identification, cut, body = None, 0, data[40:]
    if protocol == IPV6_FRAGMENT:
        protocol, reserved, cut, identification = struct.unpack_from("!BBHI", body)
        assert reserved | cut & 6 == 0, "reserved bits of the fragment header are set"
        body = body[8:]
    source, destination = str(IPv6Address(data[8:24])), str(IPv6Address(data[24:40]))
    header = Header(source, destination, protocol, hop_limit, word >> 20 & 0xFF, word & 0xFFFFF, identification, True)
    return Packet(header, cut & 0xFFF8, bool(cut & 1), body)


def parse_udp(packet: Packet, fragments: int, macs: tuple[str, str], partial: bool) -> Datagram:
    """RFC 768, its checksum always there; anything wrong is an AssertionError."""
    header, _, _, body = packet
    source_port, port, length, checksum = struct.unpack_from("!HHHH", body)
    assert length == len(body), f"UDP length {length}, but {len(body)} bytes: {header}"
    addresses = ip_address(header.source).packed + ip_address(header.destination).packed
    pseudo_header = addresses + struct.pack("!II", length, header.protocol)
    right = ones_sum(pseudo_header) == checksum % 0xFFFF if partial else checksum and not ones_sum(pseudo_header + body)
    assert right, f"wrong UDP checksum {checksum:#06x}, partial: {partial}: {header}"
    return Datagram(header.source, source_port, body[8:], port, header, fragments, macs, partial)


def reassemble(packet: Packet, pending: dict[Header, list[Packet]]) -> tuple[Packet, int] | None:
    """A whole packet and how many it came in, or None while some are missing; no byte twice, and all headers alike."""
    assert not packet.more or len(packet.body) % 8 == 0, f"{len(packet.body)} bytes, and not the last: {packet}"
    parts = pending[packet.header] = sorted([*pending.get(packet.header, []), packet], key=lambda part: part.offset)
    for part, following in pairwise(parts):
        assert part.offset + len(part.body) <= following.offset, f"fragments overlap: {part.header}"
    body = b"".join(part.body for part in parts)
    if parts[-1].more or len(body) < parts[-1].offset + len(parts[-1].body):
        return None
    return Packet(packet.header, 0, False, body), len(pending.pop(packet.header))


class Receiver(Generic[T]):
    """Something that datagrams come to."""

    sock: socket.socket

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def take(self) -> Iterator[T]:
        """Take what is there."""
        raise NotImplementedError

    def missing(self) -> str:
        """Return what is known to be lost or incomplete, or an empty string."""
        raise NotImplementedError

    def read(self, count: int, seconds: float = PATIENCE_SECONDS) -> list[T]:
        """Wait for so many datagrams, and return all that are there; too few in time is an AssertionError."""
        found, deadline = list(self.take()), time.monotonic() + seconds
        while len(found) < count and (left := deadline - time.monotonic()) > 0:
            select.select([self.sock], [], [], left)
            found += self.take()
        assert len(found) >= count, f"{len(found)} of {count} datagrams within {seconds} s {self.missing()}"
        return found

    def assert_quiet(self, seconds: float = 0.2) -> None:
        """Nothing more comes for a while, and nothing was lost."""
        time.sleep(seconds)
        assert not (found := list(self.take())), f"{len(found)} datagrams too many, the first {found[0]}"
        assert not (missing := self.missing()), missing


class Capture(Receiver[Datagram]):
    """The UDP datagrams that come in at an interface from now on; anything wrong with one is an AssertionError.

    They wait in a ring of memory (packet(7)), which a plain user may have too: 16,384 frames at MTU 1500 until they are
    read. `partial=True` also takes checksums that are left for a network card to compute.
    """

    def __init__(self, host: Host, interface: str, partial: bool = False) -> None:
        self.sock = host.socket(socket.AF_PACKET, socket.SOCK_RAW)
        self._partial, self._pending = partial, dict[Header, list[Packet]]()
        self._slot = 1 << (host.link(interface)["mtu"] + 128).bit_length()
        self._slots, self._next = RING // self._slot, 0
        for option, value in ((PACKET_VERSION, TPACKET_V2), (PACKET_VNET_HDR, 1), (PACKET_IGNORE_OUTGOING, 1)):
            self.sock.setsockopt(SOL_PACKET, option, value)
        ring = struct.pack("=IIII", BLOCK, RING // BLOCK, self._slot, self._slots)  # tpacket_req
        self.sock.setsockopt(SOL_PACKET, PACKET_RX_RING, ring)
        self._ring = mmap.mmap(self.sock.fileno(), RING)
        self.sock.bind((interface, ETH_P_ALL))

    def __exit__(self, *_: object) -> None:
        self._ring.close()
        super().__exit__()

    def frames(self) -> Iterator[tuple[int, bytes, tuple[str, str], bool, int]]:
        """Take protocol, packet, MAC addresses, whether the checksum is partial, and length of GSO's segments."""
        while True:
            at = self._next * self._slot
            status, _, captured, start, packet, _, protocol, _, link_type = SLOT.unpack_from(self._ring, at)
            if not status & TP_STATUS_USER:
                return
            (segment,) = struct.unpack_from("=H", self._ring, at + start - 6)  # gso_size of virtio_net_hdr, in front
            frame = self._ring[at + start : at + start + captured]
            struct.pack_into("=I", self._ring, at, 0)  # the slot is the kernel's again
            self._next = (self._next + 1) % self._slots
            macs = (frame[6:12].hex(":"), frame[:6].hex(":")) if link_type == ARPHRD_ETHER else ("", "")
            yield socket.ntohs(protocol), frame[packet - start :], macs, bool(status & TP_STATUS_CSUMNOTREADY), segment

    def take(self) -> Iterator[Datagram]:
        """Take the datagrams that are there."""
        for protocol, data, macs, partial, segment in self.frames():
            if not (parse := {ETH_P_IP: parse_ipv4, ETH_P_IPV6: parse_ipv6}.get(protocol)):
                continue
            assert not segment, f"GSO came uncut, {len(data)} bytes or more for segments of {segment}"
            packet = parse(data)
            if packet.header.protocol == socket.IPPROTO_UDP and (whole := reassemble(packet, self._pending)):
                assert self._partial or not partial, f"nobody has computed the checksum: {packet.header}"
                yield parse_udp(*whole, macs, partial)
        _, drops = struct.unpack("=II", self.sock.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8))
        assert not drops, f"the ring was full: {drops} frames lost"

    def missing(self) -> str:
        return f"fragments of {list(self._pending)}" if self._pending else ""


class Collector(Receiver[Arrival]):
    """A collector nobody would notice in a network: a UDP socket, with the largest buffer this user can have."""

    def __init__(self, host: Host, address: str, port: int = 0, wanted: int = 1 << 26) -> None:
        self.sock = host.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, wanted)
        with suppress(PermissionError):
            self.sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, wanted)
        self.buffer = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
        self.sock.bind((address, port))
        self.port = self.sock.getsockname()[1]
        self._host, self._errors = host, host.udp_errors()

    def take(self) -> Iterator[Arrival]:
        with suppress(BlockingIOError):
            while True:
                payload, peer = self.sock.recvfrom(65536, socket.MSG_DONTWAIT)
                yield Arrival(peer[0], peer[1], payload)

    def missing(self) -> str:
        """Return what the kernel has dropped on this host, for a full buffer or a wrong checksum."""
        return f"dropped by the kernel: {dropped}" if (dropped := self._host.udp_errors() - self._errors) else ""


def assert_complete(arrivals: Iterable[Arrival], sent: Mapping[tuple[str, int], Sequence[bytes]]) -> None:
    """Each source's datagrams are all there, in order, and there are no others."""
    came: dict[tuple[str, int], list[bytes]] = defaultdict(list)
    for arrival in arrivals:
        came[arrival.source, arrival.source_port].append(arrival.payload)
    for source in came.keys() | sent.keys():
        theirs, wanted = came[source], sent.get(source, ())
        wrong = [number for number, (one, other) in enumerate(zip(theirs, wanted, strict=False)) if one != other]
        assert not wrong, f"number {wrong[0]} of {source}: {theirs[wrong[0]][:40]!r}, not {wanted[wrong[0]][:40]!r}"
        assert len(theirs) == len(wanted), f"{len(theirs)} of {len(wanted)} datagrams of {source}"
