"""The kernel's word on this host's addresses, and on the frames to others, by rtnetlink(7): no privilege is needed.

A socket that can be bound proves nothing: with `net.ipv4.ip_nonlocal_bind` it can have any address.
"""

import socket
import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import Final, TypeVar

from shared.net.netlink_format import KERNEL, RECEIVE_SIZE, attributes, messages, request

RTM_NEWLINK, RTM_GETLINK, RTM_NEWROUTE, RTM_GETROUTE, RTM_NEWNEIGH, RTM_GETNEIGH = 16, 18, 24, 26, 28, 30
ROUTE: Final = struct.Struct("=8BI")
"""struct rtmsg: family, lengths of destination and source, TOS, table, protocol, scope, type; flags."""
TYPE: Final = 7
RTN_UNICAST: Final = 1
RTN_LOCAL: Final = 2
RTA_DST, RTA_SRC, RTA_OIF, RTA_GATEWAY, RTA_METRICS, RTA_VIA = 1, 2, 4, 5, 8, 18
RTAX_MTU: Final = 2
LINK: Final = struct.Struct("=BxHiII")
"""struct ifinfomsg: family, type, link, flags, change."""
IFLA_ADDRESS, IFLA_EXT_MASK, WITHOUT_STATISTICS = 1, 29, 1 << 3
NEIGHBOUR: Final = struct.Struct("=B3xiHBB")
"""struct ndmsg: family, link, state, flags, type."""
NDA_DST, NDA_LLADDR = 1, 2
NUMBER: Final = struct.Struct("=I")
ATTRIBUTE: Final = struct.Struct("=HH")
AT_ONCE: Final = 32
"""Questions in one message, whose answers a socket's buffer holds."""
ANSWER_SECONDS: Final = 2.0

Frame = tuple[int, bytes, bytes]
"""A link, the link address of a next hop there, and the link's own."""
Pair = tuple[bytes, bytes]
"""Destination and source; the latter is empty where any will do."""
Key = TypeVar("Key")


class KernelRoutes:
    """Asks where routes lead to. Each question raises OSError without an answer."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        self._socket.bind((0, 0))
        self._socket.settimeout(ANSWER_SECONDS)
        self._sequence = 0

    def own_among(self, addresses: Iterable[bytes]) -> set[bytes]:
        """Return those of some addresses, of 4 or 16 bytes, that are this host's; 0.0.0.0 and :: are nobody's."""
        questions = {address: _question(address) for address in addresses if any(address)}
        answers = self._ask(RTM_GETROUTE, RTM_NEWROUTE, questions)
        return {address for address, body in answers if body[TYPE] == RTN_LOCAL}

    def frames_to(self, pairs: Iterable[Pair]) -> dict[Pair, Frame]:
        """Return the frames by which the kernel sends its own packets; what it does not know of them is empty."""
        hops: dict[Pair, tuple[int, bytes]] = {}
        for pair, body in self._ask(RTM_GETROUTE, RTM_NEWROUTE, {pair: _question(*pair) for pair in pairs}):
            found = attributes(body[ROUTE.size :])
            if body[TYPE] == RTN_UNICAST and RTA_OIF in found:
                via = found.get(RTA_VIA, b"")[2:]  # behind its family
                hops[pair] = *NUMBER.unpack(found[RTA_OIF]), found.get(RTA_GATEWAY) or via or pair[0]
        neighbours = {
            hop: attributes(body[NEIGHBOUR.size :]).get(NDA_LLADDR, b"")
            for hop, body in self._ask(RTM_GETNEIGH, RTM_NEWNEIGH, {hop: _neighbour(*hop) for hop in hops.values()})
        }
        links = {
            link: attributes(body[LINK.size :]).get(IFLA_ADDRESS, b"")
            for link, body in self._ask(RTM_GETLINK, RTM_NEWLINK, {link: _link(link) for link, _ in hops.values()})
        }
        return {pair: (hop[0], neighbours.get(hop, b""), links.get(hop[0], b"")) for pair, hop in hops.items()}

    def mtus(self, pairs: Iterable[Pair]) -> dict[Pair, int]:
        """Return the MTU of each way where one is set, or a router has told of it (RFC 8201); else 0."""
        found = {}
        for pair, body in self._ask(RTM_GETROUTE, RTM_NEWROUTE, {pair: _question(*pair) for pair in pairs}):
            metrics = attributes(attributes(body[ROUTE.size :]).get(RTA_METRICS, b""))
            (found[pair],) = NUMBER.unpack(metrics.get(RTAX_MTU, bytes(NUMBER.size)))
        return found

    def _ask(self, kind: int, wanted: int, questions: Mapping[Key, bytes]) -> Iterator[tuple[Key, bytes]]:
        """Yield the answers of the wanted kind; the kernel may answer with an error, such as ENETUNREACH, instead."""
        keys = list(questions)
        for start in range(0, len(keys), AT_ONCE):
            waiting = dict(enumerate(keys[start : start + AT_ONCE], self._sequence))
            self._sequence = (self._sequence + len(waiting)) % (1 << 31)
            asked = [request(kind, 0, number, questions[key]) for number, key in waiting.items()]
            self._socket.sendto(b"".join(asked), KERNEL)
            while waiting:
                data, sender = self._socket.recvfrom(RECEIVE_SIZE)
                for answer, number, body in messages(data) if sender[0] == KERNEL[0] else ():
                    if number in waiting:
                        key = waiting.pop(number)
                        if answer == wanted:
                            yield key, body

    def close(self) -> None:
        """Ask nothing more."""
        self._socket.close()


def _family(address: bytes) -> int:
    return socket.AF_INET if len(address) == 4 else socket.AF_INET6


def _attribute(kind: int, value: bytes) -> bytes:
    return ATTRIBUTE.pack(ATTRIBUTE.size + len(value), kind) + value


def _neighbour(link: int, address: bytes) -> bytes:
    return NEIGHBOUR.pack(_family(address), link, 0, 0, 0) + _attribute(NDA_DST, address)


def _link(index: int) -> bytes:
    return LINK.pack(0, 0, index, 0, 0) + _attribute(IFLA_EXT_MASK, NUMBER.pack(WITHOUT_STATISTICS))


def _question(to: bytes, source: bytes = b"") -> bytes:
    """Ask for the route to an address, from one of this host's or, where that is empty, from any."""
    header = ROUTE.pack(_family(to), 8 * len(to), 8 * len(source), 0, 0, 0, 0, 0, 0)
    return header + _attribute(RTA_DST, to) + (_attribute(RTA_SRC, source) if source else b"")
