"""The ways to collectors: route, link and next hop, remembered and kept true by netlink events."""

import contextlib
import socket
import time
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

from services.transmitter.netlink import (
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
from shared.ledger import INTERFACE_DOWN, NO_ROUTE

DISCARD_PORT: Final = 9
"""RFC 863: what comes there is thrown away."""
LOOK_AGAIN_SECONDS: Final = 0.1
LOOK_AGAIN_SHARE: Final = 10
"""A router's table may change all the time: a change makes all ways be asked for anew at most so often, for one part in
so many of the time."""
IDLE_ROUNDS: Final = 60
"""Seconds after which a next hop that nothing was sent to is forgotten."""


@dataclass(slots=True)
class Hop:
    """A next hop as the kernel knows it now. `idle`: seconds since it was used; `probed`: asked for within this one."""

    link_index: int
    address: str
    state: int
    link_address: bytes
    idle: int = 0
    probed: bool = False

    @property
    def usable(self) -> bool:
        """Whether frames can be sent to it."""
        return bool(self.state & NUD_USABLE) and bool(self.link_address)


class WayKind(Enum):
    """How a collector is reached: frames to a next hop, raw IP that the kernel routes, or not at all."""

    FRAMES = auto()
    PACKETS = auto()
    NONE = auto()


@dataclass(frozen=True, slots=True)
class Way:
    """The way to a collector. `cause`: why there is none. `local`: it is on this host."""

    kind: WayKind
    cause: str = ""
    link: Link | None = None
    hop: Hop | None = None
    mtu: int = 0
    local: bool = False


class Neighbourhood:
    """Finds ways. `version` grows when those found earlier may be wrong; a hop's state is always that of now."""

    def __init__(self) -> None:
        self.version = 0
        self._routes_changed = False
        self._look_again_at = self._asked_seconds = 0.0
        self._netlink = Netlink()
        self._probes = {family: _open_probe(family) for family in (socket.AF_INET, socket.AF_INET6)}
        self._hops: dict[tuple[int, str], Hop] = {}
        self._links: dict[int, Link] = {}
        self._reload()

    def fileno(self) -> int:
        """Readable when something has changed."""
        return self._netlink.fileno()

    def _reload(self) -> None:
        self._links = {link.index: link for link in self._netlink.links()}
        self._hops.clear()
        self.version += 1

    def link(self, name: str) -> Link | None:
        """The link of a name."""
        return next((link for link in self._links.values() if link.name == name), None)

    def follow(self) -> None:
        """Take in what has changed."""
        changed = False
        for event in self._netlink.events():
            match event:
                case Neighbour():
                    if hop := self._hops.get((event.link_index, event.address)):
                        hop.state, hop.link_address = event.state, event.link_address
                case Link():
                    changed |= self._links.get(event.index) != event
                    self._links[event.index] = event
                case LinkGone():
                    changed |= self._links.pop(event.index, None) is not None
                case RoutesChanged():
                    self._routes_changed = True
                case EventsLost():
                    self._reload()
        now = time.monotonic()
        if self._routes_changed and now >= self._look_again_at:
            changed, self._routes_changed = True, False
            self._look_again_at = now + max(LOOK_AGAIN_SECONDS, LOOK_AGAIN_SHARE * self._asked_seconds)
            self._asked_seconds = 0.0
        self.version += changed

    def way(self, address: str) -> Way:
        """The way to an address. Costs a question or two to the kernel: keep it until `version` grows."""
        began = time.monotonic()
        way = self._find(address)
        self._asked_seconds += time.monotonic() - began
        return way

    def _find(self, address: str) -> Way:
        route = self._netlink.route(address)
        if route is None or route.kind not in (RTN_UNICAST, RTN_LOCAL):
            return Way(WayKind.NONE, NO_ROUTE)
        link = self._links.get(route.link_index)
        if link is None or not link.up:
            return Way(WayKind.NONE, INTERFACE_DOWN)
        mtu = min(route.mtu or link.mtu, link.mtu)
        if not link.ethernet or route.kind == RTN_LOCAL:
            return Way(WayKind.PACKETS, link=link, mtu=mtu, local=route.kind == RTN_LOCAL)
        return Way(WayKind.FRAMES, link=link, hop=self._hop(link.index, route.next_hop), mtu=mtu)

    def _hop(self, link_index: int, address: str) -> Hop:
        key = link_index, address
        if key not in self._hops:
            known = self._netlink.neighbour(*key)
            self._hops[key] = Hop(*key, known.state, known.link_address)
        return self._hops[key]

    def resolve(self, hop: Hop) -> None:
        """Have the kernel find out a next hop's link address, unless that was asked for a moment ago.

        An empty datagram to the discard port, which goes no further than the next hop, is what makes it ask without a
        privilege. It leaves by a plain socket, so a hop that never answers fills no buffer that copies need.
        """
        if hop.probed:
            return
        hop.probed = True
        family = socket.AF_INET6 if ":" in hop.address else socket.AF_INET
        scope = (0, hop.link_index) if family == socket.AF_INET6 else ()
        probe = self._probes[family]
        if probe is not None:
            with contextlib.suppress(OSError):  # what is wrong shows in the hop's state; this was only a question
                probe.sendto(b"", (hop.address, DISCARD_PORT, *scope))

    def refresh(self) -> None:
        """Have hops that are in use confirmed, as the kernel does for its own traffic, and forget idle ones.

        We send past the kernel, which therefore never notices by itself that a link address has changed: an entry in
        state STALE is probed, and becomes REACHABLE or FAILED. Due every second.
        """
        for key, hop in list(self._hops.items()):
            hop.probed = False
            hop.idle += 1
            if hop.idle > IDLE_ROUNDS:
                del self._hops[key]
                self.version += 1
            elif hop.idle == 1 and (hop.state & NUD_STALE or not hop.usable):
                self.resolve(hop)

    def close(self) -> None:
        """Close all sockets."""
        self._netlink.close()
        for probe in self._probes.values():
            if probe is not None:
                probe.close()


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
