"""The ways to collectors: route, link and next hop, remembered and kept up to date by netlink events."""

import ipaddress
import os
import socket
import struct
import time
from collections.abc import Collection
from dataclasses import dataclass, replace
from enum import IntEnum, auto
from typing import Final
from weakref import WeakValueDictionary

from shared.fanout.sending.route_scope import RouteScope
from shared.ledger.counters import INTERFACE_DOWN, NO_ROUTE
from shared.log import get_logger
from shared.net.netlink import (
    NUD_STALE,
    NUD_USABLE,
    RTN_LOCAL,
    RTN_UNICAST,
    EventsLost,
    Link,
    LinkGone,
    Neighbour,
    Netlink,
    RoutesChanged,
)
from shared.net.queues import Queues

DISCARD_PORT: Final = 9
"""RFC 863: datagrams to this port are discarded."""
MTU: Final = {socket.AF_INET: (socket.IPPROTO_IP, 14), socket.AF_INET6: (socket.IPPROTO_IPV6, 24)}
"""IP_MTU, IPV6_MTU: the MTU of a connected socket's path."""
IP_PKTINFO: Final = 8
"""linux/in.h: with a link's number, the link that a datagram leaves by, whatever the routes say (ip(7), ipv6(7))."""
PKTINFO4: Final = struct.Struct("=i8x")
PKTINFO6: Final = struct.Struct("=16xi")
ASK_AGAIN_SECONDS: Final = 0.1
ASK_AGAIN_SHARE: Final = 10
"""A router's table, or a link, may change all the time. After a change all ways are asked for anew: at most once in
this time, and for one part in this many of it."""


log = get_logger()


@dataclass(slots=True, weakref_slot=True)
class Hop:
    """A next hop as the kernel knows it now; `used` within this second, and `probed`: its address was asked for."""

    link_index: int
    address: str
    state: int = 0
    link_address: bytes = b""
    used: bool = False
    probed: bool = False

    @property
    def usable(self) -> bool:
        """Return whether frames can be sent to it."""
        return bool(self.state & NUD_USABLE) and bool(self.link_address)


class EgressKind(IntEnum):
    """The kind of way to a collector: frames to a next hop, raw IP that the kernel routes, or none."""

    FRAMES = auto()
    PACKETS = auto()
    NONE = auto()


@dataclass(frozen=True, slots=True)
class Egress:
    """The way to a collector. `cause`: the reason if there is none."""

    kind: EgressKind
    cause: str = ""
    link: Link | None = None
    hop: Hop | None = None
    mtu: int = 0
    scope: RouteScope = RouteScope.ROUTED
    takes_runs: bool = False
    """True for frames, unless the link's queue would lose some of a run in silence."""

    @property
    def local(self) -> bool:
        """Return whether it is on this host."""
        return self.scope is RouteScope.HOST


class NextHops:
    """Finds ways. `version` grows when earlier ones may be wrong; a hop's state is always the present one.

    Where this host allows no netlink sockets, nothing is known of links and hops: all ways are by raw IP then.
    """

    def __init__(self) -> None:
        self.version = 0
        self.stale = False
        """True if a change was seen that makes `version` grow soon."""
        self._events_lost = False
        self._ask_again_at = self._asked_seconds = 0.0
        self._netlink = _open_netlink()
        self._probes = {family: _open_probe(family) for family in (socket.AF_INET, socket.AF_INET6)}
        self._hops: WeakValueDictionary[tuple[int, str], Hop] = WeakValueDictionary()  # a hop lives as long as its ways
        self._links = self._ask_links()
        self._queues = Queues()

    @property
    def blind(self) -> bool:
        """True if links, routes and neighbours can't be seen."""
        return self._netlink is None

    def fileno(self) -> int:
        """Return the descriptor that is readable when something has changed; -1 without netlink."""
        return self._netlink.fileno() if self._netlink else -1

    def _ask_links(self) -> dict[int, Link]:
        return {link.index: link for link in self._netlink.links()} if self._netlink else {}

    def link(self, name: str) -> Link | None:
        """Return the link of a name."""
        return next((link for link in self._links.values() if link.name == name), None)

    @property
    def links(self) -> Collection[Link]:
        """Return the links that there are."""
        return self._links.values()

    def addresses(self) -> list[str]:
        """Return every address of this host; none without netlink."""
        return self._netlink.addresses() if self._netlink else []

    def apply_events(self) -> int:
        """Apply the changes that netlink reports; return their number."""
        events = [*self._netlink.events()] if self._netlink else []
        for event in events:
            match event:
                case Neighbour():
                    if hop := self._hops.get((event.link_index, event.address)):
                        hop.state, hop.link_address = event.state, event.link_address
                case Link():
                    known = self._links.get(event.index, event)  # ways by a new link come with their routes
                    self.stale |= replace(event, name=known.name) != known
                    self._links[event.index] = event
                case LinkGone():
                    self.stale |= self._links.pop(event.index, None) is not None
                case RoutesChanged():
                    self.stale = True
                case EventsLost():
                    self.stale = self._events_lost = True
        if self.stale and time.monotonic() >= self._ask_again_at:
            self._ask_anew()
        return len(events)

    def _ask_anew(self) -> None:
        """Let ways be asked for anew; after lost events, all other remembered facts too."""
        began = time.monotonic()
        self._ask_again_at = began + max(ASK_AGAIN_SECONDS, ASK_AGAIN_SHARE * self._asked_seconds)
        self.stale, self._asked_seconds = False, 0.0
        self.version += 1
        if self._events_lost:
            self._events_lost = False
            self._links = self._ask_links()
            for hop in list(self._hops.values()):
                self._ask(hop)
            self._asked_seconds += time.monotonic() - began

    def egress_to(self, address: str, source: str = "") -> Egress:
        """Return the way to an address. It costs a question or two to the kernel: keep it until `version` grows.

        With `source`, an address of this host, it is the way from there, which rules may make another one (ip-rule(8)).
        """
        began = time.monotonic()
        egress = self._find(address, source)
        self._asked_seconds += time.monotonic() - began
        return egress

    def _find(self, address: str, source: str) -> Egress:
        if self._netlink is None:
            return _egress_unseen(address)
        route = self._netlink.route(address, source)
        if route is None or route.kind not in (RTN_UNICAST, RTN_LOCAL):
            return Egress(EgressKind.NONE, NO_ROUTE)
        link = self._links.get(route.link_index)
        if link is None or not link.up:
            return Egress(EgressKind.NONE, INTERFACE_DOWN)
        mtu = min(route.mtu or link.mtu, link.mtu)
        if route.kind == RTN_LOCAL:
            return Egress(EgressKind.PACKETS, link=link, mtu=mtu, scope=RouteScope.HOST)
        scope = RouteScope.LINK if route.next_hop == address else RouteScope.ROUTED
        if not link.ethernet:
            return Egress(EgressKind.PACKETS, link=link, mtu=mtu, scope=scope)
        hop, takes_runs = self._hop(link.index, route.next_hop), self._queues.take_runs_by(link.index, self.version)
        return Egress(EgressKind.FRAMES, link=link, hop=hop, mtu=mtu, scope=scope, takes_runs=takes_runs)

    def _hop(self, link_index: int, address: str) -> Hop:
        hop = self._hops.get((link_index, address))
        if hop is None:
            hop = self._hops[link_index, address] = Hop(link_index, address)
            self._ask(hop)
        return hop

    def _ask(self, hop: Hop) -> None:
        if self._netlink is not None:
            known = self._netlink.neighbour(hop.link_index, hop.address)
            hop.state, hop.link_address = known.state, known.link_address

    def resolve(self, hop: Hop) -> None:
        """Let the kernel find out a next hop's link address, unless that was asked for a moment ago.

        An empty datagram to the discard port, which goes no further than the next hop, makes the kernel ask without a
        privilege. It leaves by a plain socket, so a hop that never answers fills no buffer that copies need.
        """
        if hop.probed:
            return
        hop.probed = True
        if ":" in hop.address:
            probe, by_link = self._probes[socket.AF_INET6], PKTINFO6.pack(hop.link_index)
            control = (socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, by_link)
        else:
            probe, by_link = self._probes[socket.AF_INET], PKTINFO4.pack(hop.link_index)
            control = (socket.IPPROTO_IP, IP_PKTINFO, by_link)
        if probe is not None:
            try:
                probe.sendmsg([], [control], socket.MSG_DONTROUTE, (hop.address, DISCARD_PORT))
            except BlockingIOError:
                hop.probed = False  # probes of hops that do not answer fill the socket: ask again as soon as possible
                return
            except OSError:
                pass  # a fault shows in the hop's state; this was only a question
        if not hop.state:  # where a link has no ARP the kernel knows at once, and reports no event
            self._ask(hop)

    def refresh(self) -> None:
        """Get hops that are in use confirmed, as the kernel does for its own traffic. Due every second.

        Frames bypass the kernel, so it never notices by itself that a link address has changed: an entry in state STALE
        is probed, and becomes REACHABLE or FAILED.
        """
        self.version += self.blind  # nobody tells of changes
        for hop in list(self._hops.values()):
            hop.probed = False
            if hop.used and (hop.state & NUD_STALE or not hop.usable):
                self.resolve(hop)
            hop.used = False

    def close(self) -> None:
        """Close all sockets."""
        self._queues.close()
        if self._netlink is not None:
            self._netlink.close()
        for probe in self._probes.values():
            if probe is not None:
                probe.close()


def _open_netlink() -> Netlink | None:
    try:
        return Netlink()
    except OSError as error:
        log.warning(
            "routes and next hops can't be asked for: copies leave by raw IP, raw frames are refused; "
            "allow AF_NETLINK: RestrictAddressFamilies= of a unit, a sandbox's seccomp profile",
            reason=os.strerror(error.errno or 0),
        )
        return None


def _egress_unseen(address: str) -> Egress:
    """The way to an address, by what a connected socket tells of it; nothing is sent."""
    ip = ipaddress.ip_address(address)
    family = socket.AF_INET if ip.version == 4 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((address, DISCARD_PORT))
            ours = ip.is_loopback or probe.getsockname()[0] == address
            mtu = probe.getsockopt(*MTU[family])
    except OSError:
        return Egress(EgressKind.NONE, NO_ROUTE)
    return Egress(EgressKind.PACKETS, mtu=mtu, scope=RouteScope.HOST if ours else RouteScope.ROUTED)


def _open_probe(family: socket.AddressFamily) -> socket.socket | None:
    try:
        probe = socket.socket(family, socket.SOCK_DGRAM)
    except OSError:  # a host without IPv6
        return None
    probe.setblocking(False)
    if family == socket.AF_INET:
        probe.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, 1)
    else:
        probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS, 1)
    return probe
