"""The facts of this host that a plan is made of: listeners, addresses, links, next hops, the forwarder's sockets."""

import ipaddress
import time
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from typing import Final

from services.offload.kernel_routes import KernelRoutes
from services.offload.planning.planner import Facts, Place, Served, Way
from shared.client import Trouble
from shared.fanout.sending.next_hops import Egress, EgressKind, NextHops
from shared.fanout.sending.route_scope import RouteScope
from shared.ledger.counters import INTERFACE_DOWN
from shared.log import get_logger
from shared.net.netlink import stacked
from shared.net.queues import Drops, Queues
from shared.net.udp_sockets import udp_sockets
from shared.settings.entries import Stream
from shared.settings.model import Settings
from shared.settings.own_listeners import FollowedListeners

SOON_SECONDS: Final = 0.25
SETTLED_SECONDS: Final = 1.0
"""Between looks at the forwarder's sockets, of which nothing tells: while something is not settled, and else."""
MTU_SECONDS: Final = 5.0
"""Between questions for MTUs that routers on the way have told of, of which nothing tells either."""
MTU_SHARE: Final = 50
"""These questions take at most one part in this many of a core: 10,000 ways take 0.2 to 0.4 s."""
WITHOUT: Final = {INTERFACE_DOWN: "the link to it is down"}
"""Reasons by the cause for which there is no way; by any other there is no route."""

log = get_logger()


class Surroundings:
    """Follows the kernel's tables, and looks up the rest when a plan is made."""

    def __init__(self, settings: Settings) -> None:
        self.next_hops = NextHops()
        self._queues = Queues()
        self._ways: dict[tuple[str, str], Egress] = {}
        """By address and source."""
        self._found_at = -1
        self._routes = None if self.next_hops.blind else KernelRoutes()
        self._addresses: list[str] = []
        self._own: set[str] = set()
        """Addresses that this host takes datagrams in for: not one that another host turns out to have (RFC 4862)."""
        self._relays: dict[Place, Place] = {}
        self._looked_at = self._mtus_at = 0.0
        self._connected: set[Place] = set()
        """Collectors to which a socket is connected now."""
        self._wanted = settings.offload.interfaces
        self._left_out: Mapping[str, str] = {}
        self._listeners = FollowedListeners(_offloaded(settings))

    def apply_settings(self, settings: Settings) -> None:
        """Use the streams of these settings from now on."""
        self._listeners = FollowedListeners(_offloaded(settings), self._listeners)

    def apply_events(self) -> bool:
        """Apply the changes that the kernel and resolvers report; return whether there were any."""
        told = self.next_hops.apply_events() > 0
        return self._listeners.tick() or told or self._found_at != self.next_hops.version

    def refresh(self) -> bool:
        """Do what the kernel does for its own traffic, and not for copies by rules; return whether ways have changed.

        Next hops are confirmed, and an MTU is heeded that a router has told of. Due every second.
        """
        for egress in self._ways.values():
            if egress.hop is not None:
                egress.hop.used = True
        self.next_hops.refresh()
        if self._routes is None or time.monotonic() < self._mtus_at:
            return False
        began, before = time.thread_time(), len(self._ways)
        with suppress(OSError):
            self._forget_other_mtus(self._routes)
        self._mtus_at = time.monotonic() + max(MTU_SECONDS, MTU_SHARE * (time.thread_time() - began))
        return len(self._ways) < before

    def _forget_other_mtus(self, routes: KernelRoutes) -> None:
        """Forget ways behind a router that have another MTU by now."""
        routed = {(_pack(to), _pack(source)): (to, source) for to, source in self._ways}
        for pair, mtu in routes.mtus(pair for pair, way in routed.items() if self._is_routed(way)).items():
            link = self._ways[routed[pair]].link
            if link and self._ways[routed[pair]].mtu != min(mtu or link.mtu, link.mtu):
                del self._ways[routed[pair]]

    def _is_routed(self, way: tuple[str, str]) -> bool:
        return self._ways[way].scope is RouteScope.ROUTED and self._ways[way].kind is EgressKind.FRAMES

    def sockets_changed(self, collectors: Collection[Place]) -> bool:
        """Return whether the forwarder's sockets are others than before, for collectors at these places.

        It looks once a second, and a few times while anything is not settled.
        """
        now = time.monotonic()
        if now < self._looked_at + (SETTLED_SECONDS if self.is_settled(collectors) else SOON_SECONDS):
            return False
        self._looked_at = now
        before = self._relays
        connected = [each for each in udp_sockets() if (each.peer, each.peer_port) in collectors] if collectors else []
        # A socket that is being connected has no address of its own yet.
        ready = [each for each in reversed(connected) if int(ipaddress.ip_address(each.address)) and each.port]
        found = {(each.peer, each.peer_port): (each.address, each.port) for each in ready}
        self._connected = {*found}
        # Other programs may send there, too: a source that is still connected stays.
        there = {((each.peer, each.peer_port), (each.address, each.port)) for each in ready}
        found |= {place: own for place, own in before.items() if (place, own) in there}
        # While the forwarder is restarted, the kernel goes on with the sources of before.
        kept = {place: own for place, own in before.items() if place in collectors and own[0] in self._own}
        self._relays = kept | found
        return before != self._relays

    def is_settled(self, collectors: Collection[Place]) -> bool:
        """Return whether the forwarder had a socket for each of these at the last look, and all else is looked up."""
        return self._connected == {*collectors} and not self.next_hops.stale and self._listeners.settled

    def gather(self, troubled: Mapping[tuple[str, int], Trouble | None]) -> Facts:
        """Return the facts as they are now, with the collectors that are in trouble."""
        if self._found_at != self.next_hops.version:
            self._found_at = self.next_hops.version
            self._ways.clear()
            self._addresses = self.next_hops.addresses()
        listening = [address for places in self._listeners.places.values() for address, _ in places]
        sources = {address for address, _ in self._relays.values()}
        asked = {ipaddress.ip_address(each.partition("%")[0]) for each in (*self._addresses, *listening, *sources)}
        packed = {each.packed: str(each) for each in asked}
        with suppress(OSError):  # no answer: what was known is as good as anything
            self._own = {packed[own] for own in self._routes.own_among(packed)} if self._routes else set()
        links = self.next_hops.links
        wanted = {link.name: link.mtu for link in links if link.ethernet and link.name in self._wanted}
        left_out = stacked(links, wanted)
        self._note_left_out(left_out)
        interfaces = {name: mtu for name, mtu in wanted.items() if name not in left_out}
        listeners = {name: self._expanded(places) for name, places in self._listeners.places.items()}
        # A socket keeps its address though this host has it no more, and can't send from there until it is back.
        relays = {place: source for place, source in self._relays.items() if source[0] in self._own}
        return Facts(listeners, interfaces, self._way_to, relays, troubled)

    def _note_left_out(self, left_out: Mapping[str, str]) -> None:
        """Say by which interfaces the kernel makes no copies: what arrives there arrives elsewhere, too."""
        if left_out != self._left_out:
            self._left_out = left_out
            for name, other in left_out.items():
                log.warning(
                    "[offload] interfaces names two by which the same datagrams arrive: the kernel copies by one of "
                    "them alone; take the other out",
                    copied_by=other,
                    not_by=name,
                )

    def _expanded(self, places: list[Place]) -> set[Place]:
        """Return the places that other hosts reach; 0.0.0.0 and ::, which is dual-stack, are all of our addresses."""
        found: set[Place] = set()
        for scoped, port in places:
            ip = ipaddress.ip_address(scoped.partition("%")[0])
            covered = [own for own in self._own if ip.version == 6 or ":" not in own]
            found |= {(own, port) for own in covered if own == str(ip) or not int(ip)}
        return {place for place in found if not ipaddress.ip_address(place[0]).is_loopback}

    def _egress(self, address: str, source: str = "") -> Egress:
        egress = self._ways.get((address, source))
        if egress is None:
            egress = self._ways[address, source] = self.next_hops.egress_to(address, source)
        return egress

    def leaves_as_packets(self, address: str) -> bool:
        """Return whether copies to an address leave as packets: without Ethernet, or on this host."""
        return self._egress(address).kind is EgressKind.PACKETS

    def dropped(self) -> Mapping[int, Drops]:
        """Return what each link has dropped on the way out."""
        return self._queues.dropped()

    def links_of(self, served: Iterable[Served]) -> dict[int, str]:
        """Return the links, with their names, that copies leave by."""
        used = {each.copy.link_index for each in served}
        return {link.index: link.name for link in self.next_hops.links if link.index in used}

    def _way_to(self, address: str, source: str) -> Way | str:
        egress = self._egress(address, source)
        if egress.kind is EgressKind.NONE:
            return WITHOUT.get(egress.cause, "there is no route to it")
        if egress.kind is EgressKind.PACKETS or egress.link is None or egress.hop is None:
            return "it is on this host" if egress.local else "the link to it is not Ethernet"
        if not egress.hop.usable:
            self.next_hops.resolve(egress.hop)
        if not egress.hop.usable:
            return "the link address of its next hop is not known"
        return Way(egress.link.index, egress.hop.link_address, egress.link.address, egress.mtu)

    def close(self) -> None:
        """Follow nothing more."""
        self.next_hops.close()
        if self._routes is not None:
            self._routes.close()
        self._queues.close()


def _pack(address: str) -> bytes:
    return ipaddress.ip_address(address).packed if address else b""


def _offloaded(settings: Settings) -> list[Stream]:
    return [stream for stream in settings.streams if stream.offload]
