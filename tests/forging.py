"""Datagrams whose source somebody made up, as exporters' enemies send them; to hosts of the tests alone."""

import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager

from shared.datagrams.limits import MAX_DATAGRAM
from tests.capture import ones_sum
from tests.lab import assert_entered
from tests.network import HERE, Host

Source = tuple[str, int]


def forged(source: Source, destination: Source, payload: bytes, *, checksum: bool = True, wrong: int = 0) -> bytes:
    """A packet of IPv4 or IPv6, whole, with any source address and port; its checksum left out, or off by `wrong`."""
    assert len(payload) <= MAX_DATAGRAM
    family = family_of(destination)
    ends = socket.inet_pton(family, source[0]) + socket.inet_pton(family, destination[0])
    length = 8 + len(payload)
    ports = struct.pack("!3H", source[1], destination[1], length)
    right = (
        0xFFFF - ones_sum(ends + struct.pack("!2H", socket.IPPROTO_UDP, length) + ports + payload) if checksum else 0
    )
    udp = ports + (right ^ wrong).to_bytes(2) + payload
    if family == socket.AF_INET6:
        return struct.pack("!IHBB", 6 << 28, length, socket.IPPROTO_UDP, 64) + ends + udp
    return struct.pack("!BBHHHBBH", 0x45, 0, 20 + length, 0, 0, 64, socket.IPPROTO_UDP, 0) + ends + udp


def family_of(destination: Source) -> socket.AddressFamily:
    """Return the family of its address."""
    return socket.AF_INET6 if ":" in destination[0] else socket.AF_INET


class Forger:
    """Sends such packets from a host."""

    def __init__(self, host: Host = HERE) -> None:
        assert_entered()
        self._sockets = {
            family: host.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW)
            for family in (socket.AF_INET, socket.AF_INET6)
        }

    def send(
        self, source: Source, destination: Source, payload: bytes, *, checksum: bool = True, wrong: int = 0
    ) -> None:
        """Send one; IPv4's own checksum, and an identification, the kernel fills in (raw(7))."""
        self.send_packet(forged(source, destination, payload, checksum=checksum, wrong=wrong), destination)

    def send_packet(self, packet: bytes, destination: Source) -> None:
        """Send what `forged` has made, perhaps changed."""
        self._sockets[family_of(destination)].sendto(packet, (destination[0], 0))

    def close(self) -> None:
        """Close its sockets."""
        for sock in self._sockets.values():
            sock.close()


@contextmanager
def forging(host: Host = HERE) -> Iterator[Forger]:
    """A forger on a host, closed at the end."""
    forger = Forger(host)
    try:
        yield forger
    finally:
        forger.close()
