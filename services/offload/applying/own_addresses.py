"""The kernel's word on which addresses are this host's, by rtnetlink(7), for which no privilege is needed.

A socket that can be bound proves nothing: with `net.ipv4.ip_nonlocal_bind` it can have any address.
"""

import socket
import struct
from collections.abc import Iterable
from typing import Final

from shared.net.netlink_format import KERNEL, RECEIVE_SIZE, messages, request

RTM_NEWROUTE: Final = 24
RTM_GETROUTE: Final = 26
ROUTE: Final = struct.Struct("=8BI")
"""struct rtmsg: family, lengths of destination and source, TOS, table, protocol, scope, type; flags."""
TYPE: Final = 7
RTN_LOCAL: Final = 2
ATTRIBUTE: Final = struct.Struct("=HH")
RTA_DST: Final = 1
AT_ONCE: Final = 64
"""Questions in one message, whose answers a socket's buffer holds."""
ANSWER_SECONDS: Final = 2.0


class OwnAddresses:
    """Asks to which addresses the routes end on this host."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        self._socket.bind((0, 0))
        self._socket.settimeout(ANSWER_SECONDS)
        self._sequence = 0

    def among(self, addresses: Iterable[bytes]) -> set[bytes]:
        """Return those of some addresses, of 4 or 16 bytes, that are this host's. OSError without an answer.

        0.0.0.0 and :: are nobody's.
        """
        asked = [address for address in {*addresses} if any(address)]
        return {own for start in range(0, len(asked), AT_ONCE) for own in self._ask(asked[start : start + AT_ONCE])}

    def _ask(self, addresses: list[bytes]) -> set[bytes]:
        waiting = dict(enumerate(addresses, self._sequence))
        self._sequence = (self._sequence + len(addresses)) % (1 << 31)
        self._socket.sendto(b"".join(_question(number, address) for number, address in waiting.items()), KERNEL)
        found = set()
        while waiting:
            data, sender = self._socket.recvfrom(RECEIVE_SIZE)
            for kind, number, body in messages(data) if sender[0] == KERNEL[0] else ():
                address = waiting.pop(number, b"")
                if address and kind == RTM_NEWROUTE and body[TYPE] == RTN_LOCAL:
                    found.add(address)
        return found

    def close(self) -> None:
        """Ask nothing more."""
        self._socket.close()


def _question(number: int, address: bytes) -> bytes:
    family = socket.AF_INET if len(address) == 4 else socket.AF_INET6
    to = ATTRIBUTE.pack(ATTRIBUTE.size + len(address), RTA_DST) + address
    return request(RTM_GETROUTE, 0, number, ROUTE.pack(family, 8 * len(address), 0, 0, 0, 0, 0, 0, 0) + to)
