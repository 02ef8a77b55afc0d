"""Routes, neighbours and links of the kernel, asked and followed by rtnetlink(7); no privilege is needed.

The sockets are plain ones, to be polled with the rest; pyroute2 knows the format of the messages.
"""

import errno
import socket
import struct
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from pyroute2.netlink import NLM_F_DUMP, NLM_F_REQUEST, nlmsg
from pyroute2.netlink.exceptions import NetlinkDecodeError
from pyroute2.netlink.rtnl import (
    RTM_DELLINK,
    RTM_DELNEIGH,
    RTM_GETADDR,
    RTM_GETLINK,
    RTM_GETNEIGH,
    RTM_GETROUTE,
    RTM_NEWLINK,
    RTM_NEWNEIGH,
    RTNLGRP_IPV4_IFADDR,
    RTNLGRP_IPV4_ROUTE,
    RTNLGRP_IPV4_RULE,
    RTNLGRP_IPV6_IFADDR,
    RTNLGRP_IPV6_ROUTE,
    RTNLGRP_IPV6_RULE,
    RTNLGRP_LINK,
    RTNLGRP_NEIGH,
    RTNLGRP_TC,
)
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
from pyroute2.netlink.rtnl.marshal import MarshalRtnl
from pyroute2.netlink.rtnl.ndmsg import ndmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg

SOL_NETLINK: Final = 270
NETLINK_ADD_MEMBERSHIP: Final = 1
NETLINK_GET_STRICT_CHK: Final = 12
"""Lets a dump be limited to one link (netlink(7))."""
RECEIVE_SIZE: Final = 1 << 17
"""Bytes: more than the kernel puts into one message."""
ANSWER_SECONDS: Final = 2.0
EVENT_BUFFER: Final = 1 << 20
EVENTS_AT_ONCE: Final = 64
GROUPS: Final = (
    RTNLGRP_LINK, RTNLGRP_NEIGH, RTNLGRP_IPV4_IFADDR, RTNLGRP_IPV4_ROUTE, RTNLGRP_IPV4_RULE,
    RTNLGRP_IPV6_IFADDR, RTNLGRP_IPV6_ROUTE, RTNLGRP_IPV6_RULE, RTNLGRP_TC,
)  # fmt: skip
HEADER: Final = struct.Struct("=IHHII")
"""struct nlmsghdr: length, type, flags, sequence, port."""
NEIGHBOUR: Final = struct.Struct("=B3xiHBB")
"""struct ndmsg: family, link, state, flags, type (linux/neighbour.h)."""
ATTRIBUTE: Final = struct.Struct("=HH")
"""struct rtattr: length with this header, type; the next one begins at a multiple of 4 bytes (rtnetlink(7))."""
NDA_DST: Final = 1
NDA_LLADDR: Final = 2

KERNEL: Final = 0
"""The kernel's netlink port."""
NLMSG_ERROR: Final = 2
NLMSG_DONE: Final = 3
ARPHRD_ETHER: Final = 1
MACVLANS: Final = frozenset({"macvlan", "macvtap"})
"""Kinds of links that have a MAC address of their own, and get the frames to that. With mode `passthru` they have the
address of the link below, and get all its frames (linux/drivers/net/macvlan.c, macvlan_handle_frame)."""
IPVLANS: Final = frozenset({"ipvlan", "ipvtap"})
"""Kinds of links that have the MAC address of the link below, and get the frames to IP addresses of their own
(linux/drivers/net/ipvlan/ipvlan_core.c, ipvlan_handle_frame)."""
IFF_UP: Final = 1
IFF_RUNNING: Final = 0x40
"""The link has carrier, as far as the driver knows; without it the kernel drops what is sent, in silence."""
RTN_UNICAST: Final = 1
RTN_LOCAL: Final = 2
RTN_BROADCAST: Final = 3
NUD_FAILED: Final = 0x20
NUD_STALE: Final = 0x04
NUD_USABLE: Final = 0x02 | NUD_STALE | 0x08 | 0x10 | 0x40 | 0x80
"""REACHABLE, STALE, DELAY, PROBE, NOARP, PERMANENT (linux/neighbour.h): the link address can be sent to."""
UNREADABLE: Final = (
    LookupError,
    TypeError,
    ValueError,
    OverflowError,
    AttributeError,
    struct.error,
    NetlinkDecodeError,
)
"""Exceptions that pyroute2 raises for a message in a format that it does not know; a newer kernel may have one."""
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Link:
    """A network interface. `ethernet` says whether its frames are Ethernet; `address` is then its 6 bytes.

    `master` is the number of the bridge or bond that it is a port of; 0: none. `below` is that of the link by which its
    frames have come already as they are; 0: none. It has all frames of that link, or only some of them (`partial`).
    """

    index: int
    name: str
    ethernet: bool
    address: bytes
    mtu: int
    up: bool
    master: int = 0
    below: int = 0
    partial: bool = False


@dataclass(frozen=True, slots=True)
class Route:
    """The route to an address: RTN_ type, link, next hop's address, and the MTU of the way where one is set."""

    kind: int
    link_index: int
    next_hop: str
    mtu: int


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A next hop on a link: its state, NUD_ bits, and its 6 bytes of link address where it has one."""

    link_index: int
    address: str
    state: int
    link_address: bytes


@dataclass(frozen=True, slots=True)
class RoutesChanged:
    """Routes, rules, addresses or queues have changed."""


@dataclass(frozen=True, slots=True)
class LinkGone:
    """A link was removed."""

    index: int


@dataclass(frozen=True, slots=True)
class EventsLost:
    """More events came than the socket could hold, or one that can't be read: remembered facts may be wrong."""


Event = Link | LinkGone | Neighbour | RoutesChanged | EventsLost


class Netlink:
    """Questions to the kernel, and its events."""

    def __init__(self) -> None:
        self._marshal = MarshalRtnl()
        self._sequence = 0
        self._events = _open()
        self._events.setblocking(False)
        self._events.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, EVENT_BUFFER)
        for group in GROUPS:
            self._events.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, group)
        self._questions = _open()
        self._questions.settimeout(ANSWER_SECONDS)
        self._questions.setsockopt(SOL_NETLINK, NETLINK_GET_STRICT_CHK, 1)

    def fileno(self) -> int:
        """Return the descriptor that is readable when there are events."""
        return self._events.fileno()

    def links(self) -> list[Link]:
        """Return every link."""
        return self._ask(ifinfmsg(), RTM_GETLINK, _link, NLM_F_DUMP)

    def route(self, address: str, source: str = "") -> Route | None:
        """Return the route to an address, as the kernel would choose it; None when there is none.

        With `source`, an address of this host, it is that of datagrams from there: rules may give them another one.
        """
        question = rtmsg()
        bits = 128 if ":" in address else 32
        question["family"], question["dst_len"], question["src_len"] = _family(address), bits, bits if source else 0
        question["attrs"] = [("RTA_DST", address), *([("RTA_SRC", source)] if source else [])]
        answers = self._ask(question, RTM_GETROUTE, lambda answer: _route(answer, address))
        return answers[0] if answers else None

    def neighbour(self, link_index: int, address: str) -> Neighbour:
        """Return what is known of a next hop; state 0 when nothing is."""
        question = ndmsg()
        question["family"], question["ifindex"] = _family(address), link_index
        question["attrs"] = [("NDA_DST", address)]
        answers = self._ask(question, RTM_GETNEIGH, _neighbour)
        return answers[0] if answers else Neighbour(link_index, address, 0, b"")

    def is_local(self, address: str) -> bool:
        """Return whether a packet to an address comes to this host: the address is its own, or is broadcast."""
        route = self.route(address)
        return route is not None and route.kind in (RTN_LOCAL, RTN_BROADCAST)

    def addresses(self) -> list[str]:
        """Return every address of this host."""
        found = self._ask(ifaddrmsg(), RTM_GETADDR, _own_address, NLM_F_DUMP)
        return [address for address in found if address]

    def _ask(self, question: nlmsg, kind: int, read: Callable[[Any], T], flags: int = 0) -> list[T]:
        """Return the answers; none where the kernel answers with an error, such as ENETUNREACH, or does not answer."""
        self._sequence += 1
        question["header"].update(type=kind, flags=NLM_F_REQUEST | flags, sequence_number=self._sequence)
        question.encode()
        answers: list[T] = []
        try:
            self._questions.sendto(question.data, (KERNEL, 0))
            while True:
                for answer in self._marshal.parse(self._receive(self._questions)):
                    if answer["header"]["sequence_number"] != self._sequence:
                        continue  # answers a question that was given up
                    if _ends(answer):
                        return answers
                    with suppress(*UNREADABLE):
                        answers.append(read(answer))
                    if not flags & NLM_F_DUMP:
                        return answers
        except (OSError, *UNREADABLE):  # too late, or ENOBUFS: the next question is answered by its own number
            return answers

    def _receive(self, sock: socket.socket) -> bytes:
        """Return the kernel's next message. Those of processes, which CAP_NET_ADMIN lets send to us, are ignored."""
        while True:
            data, (sender, _) = sock.recvfrom(RECEIVE_SIZE)
            if sender == KERNEL:
                return data

    def events(self) -> Iterator[Event]:
        """Yield the changes since the last call, up to a limit; `fileno` stays readable when there are more."""
        for _ in range(EVENTS_AT_ONCE):
            try:
                data = self._receive(self._events)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                self._discard_events()
                yield EventsLost()
                return
            try:
                found = list(self._event(data))
            except UNREADABLE:
                found = [EventsLost()]
            yield from found

    def _discard_events(self) -> None:
        """Discard queued events: they are older than those that were lost, and than the answers to new questions."""
        while True:
            try:
                self._events.recv(1)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise

    def _event(self, data: bytes) -> Iterator[Event]:
        kind = HEADER.unpack_from(data)[1]
        if kind not in (RTM_NEWLINK, RTM_DELLINK, RTM_NEWNEIGH, RTM_DELNEIGH):
            yield RoutesChanged()  # a router's table may change often: ask for its present state only when it is needed
            return
        if data[HEADER.size] == socket.AF_BRIDGE:
            return  # a bridge's report on its ports and its table: a port that leaves is no link that goes
        if kind in (RTM_NEWNEIGH, RTM_DELNEIGH):
            yield _neighbour_event(data, gone=kind == RTM_DELNEIGH)
            return
        for message in self._marshal.parse(data):
            yield _link(message) if kind == RTM_NEWLINK else LinkGone(message["index"])

    def close(self) -> None:
        """Close both sockets."""
        self._events.close()
        self._questions.close()


def _ends(answer: Any) -> bool:
    """Return whether this is the kernel's message that there is no answer, or no more of it."""
    return answer["header"]["type"] in (NLMSG_ERROR, NLMSG_DONE)


def _open() -> socket.socket:
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
    sock.bind((0, 0))
    return sock


def _family(address: str) -> int:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _link(message: Any) -> Link:
    address = message.get_attr("IFLA_ADDRESS") or ""
    info = message.get_attr("IFLA_LINKINFO")
    kind = (info and info.get_attr("IFLA_INFO_KIND")) or ""
    passing = kind in IPVLANS or (kind in MACVLANS and _mode(info) == "passthru")
    return Link(
        message["index"],
        message.get_attr("IFLA_IFNAME") or "",
        message["ifi_type"] == ARPHRD_ETHER,
        _link_address(address),
        message.get_attr("IFLA_MTU") or 0,
        message["flags"] & IFF_UP != 0 and message["flags"] & IFF_RUNNING != 0,
        message.get_attr("IFLA_MASTER") or 0,
        message.get_attr("IFLA_LINK") or 0 if passing and not _is_abroad(message) else 0,
        kind in IPVLANS,
    )


def _mode(info: Any) -> str:
    """Return the mode of a macvlan or macvtap."""
    data = info.get_attr("IFLA_INFO_DATA")
    return (data and (data.get_attr("IFLA_MACVLAN_MODE") or data.get_attr("IFLA_MACVTAP_MODE"))) or ""


def _is_abroad(message: Any) -> bool:
    """Return whether the link that another one is made of is in another namespace, where numbers are others."""
    return message.get_attr("IFLA_LINK_NETNSID") is not None


def stacked(links: Collection[Link], names: Collection[str]) -> dict[str, str]:
    """Return those of some links by which no other datagrams arrive than by another of them, with the name of that.

    One of them stands upon the other, at any depth. The upper has all that arrives by the lower, unless it is partial.
    """
    upon: dict[int, list[int]] = {}
    for link in links:
        upon.setdefault(link.index, []).append(link.master)
        upon.setdefault(link.below, []).append(link.index)
    wanted = {link.index: link for link in links if link.name in names}
    found = {}
    for index, link in wanted.items():
        above = [index]
        for lower in above:  # grows meanwhile
            above += [each for each in upon.get(lower, ()) if each and each not in above]
        for upper in (wanted[each] for each in above[1:] if each in wanted):
            left_out, kept = (upper, link) if upper.partial else (link, upper)
            found[left_out.name] = kept.name
    return {name: found.get(other, other) for name, other in found.items()}


def _own_address(message: Any) -> str:
    return message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS") or ""  # the latter may be a peer's


def _route(message: Any, address: str) -> Route | None:
    via = message.get_attr("RTA_VIA") or {}
    metrics = message.get_attr("RTA_METRICS")
    mtu = metrics.get_attr("RTAX_MTU") if metrics is not None else None
    link_index = message.get_attr("RTA_OIF")
    if link_index is None:  # blackhole, unreachable, prohibit
        return None
    next_hop = message.get_attr("RTA_GATEWAY") or via.get("addr") or address
    return Route(message["type"], link_index, next_hop, mtu or 0)


def _neighbour(message: Any) -> Neighbour:
    return Neighbour(
        message["ifindex"],
        message.get_attr("NDA_DST") or "",
        message["state"],
        _link_address(message.get_attr("NDA_LLADDR") or ""),
    )


def _neighbour_event(data: bytes, *, gone: bool) -> Neighbour:
    """Read a neighbour without pyroute2, which is slow, since a link's hosts come and go all the time."""
    family, link_index, state, _, _ = NEIGHBOUR.unpack_from(data, HEADER.size)
    attributes, at = {}, HEADER.size + NEIGHBOUR.size
    while at < len(data):
        size, kind = ATTRIBUTE.unpack_from(data, at)
        attributes[kind] = data[at + ATTRIBUTE.size : at + size]
        at += max(size, ATTRIBUTE.size) + 3 & ~3
    address = socket.inet_ntop(family, attributes[NDA_DST])
    link_address = attributes.get(NDA_LLADDR, b"")
    if gone:
        return Neighbour(link_index, address, 0, b"")
    return Neighbour(link_index, address, state, link_address if len(link_address) == 6 else b"")


def _link_address(text: str) -> bytes:
    """Return the 6 bytes of an Ethernet address, nothing for any other kind."""
    parts = text.split(":")
    return bytes.fromhex("".join(parts)) if len(parts) == 6 else b""
