"""The facts of this host that a plan is made of: listeners, addresses, links, next hops, the forwarder's sockets."""

import ipaddress
import time
from collections.abc import Collection, Iterable, Mapping
from typing import Final

from services.offload.planning.planner import Facts, Place, Served, Way
from shared.client import Trouble
from shared.fanout.sending.next_hops import Egress, EgressKind, NextHops
from shared.ledger.counters import INTERFACE_DOWN
from shared.net.multicast import is_multicast
from shared.net.queues import Drops, Queues
from shared.net.udp_sockets import udp_sockets
from shared.settings.entries import Stream
from shared.settings.model import Settings
from shared.settings.own_listeners import FollowedListeners

SOON_SECONDS: Final = 0.25
SETTLED_SECONDS: Final = 1.0
"""Between looks at the forwarder's sockets, of which nothing tells: while something is not settled, and else."""
WITHOUT: Final = {INTERFACE_DOWN: "the link to it is down"}
"""Reasons by the cause for which there is no way; by any other there is no route."""


class Surroundings:
    """Follows the kernel's tables, and looks up the rest when a plan is made."""

    def __init__(self, settings: Settings) -> None:
        self.next_hops = NextHops()
        self._queues = Queues()
        self._ways: dict[str, Egress] = {}
        self._found_at = -1
        self._own: list[str] = []
        self._relays: dict[Place, Place] = {}
        self._looked_at = 0.0
        self._connected: set[Place] = set()
        """Collectors to which a socket is connected now."""
        self._wanted = settings.offload.interfaces
        self._listeners = FollowedListeners(_offloaded(settings))

    def apply_settings(self, settings: Settings) -> None:
        """Use the streams of these settings from now on."""
        self._listeners = FollowedListeners(_offloaded(settings), self._listeners)

    def apply_events(self) -> bool:
        """Apply the changes that the kernel and resolvers report; return whether there were any."""
        told = self.next_hops.apply_events() > 0
        return self._listeners.tick() or told or self._found_at != self.next_hops.version

    def refresh(self) -> None:
        """Get next hops confirmed, as the kernel does for its own traffic: copies by rules do not. Due every second."""
        for egress in self._ways.values():
            if egress.hop is not None:
                egress.hop.used = True
        self.next_hops.refresh()

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
            own = self.next_hops.addresses()
            self._own = [address for address in own if not ipaddress.ip_address(address).is_loopback]
        ethernet = [link for link in self.next_hops.links if link.ethernet]
        interfaces = {link.name: link.mtu for link in ethernet if link.name in self._wanted}
        listeners = {name: self._expanded(places) for name, places in self._listeners.places.items()}
        return Facts(listeners, interfaces, self._way_to, self._relays, troubled)

    def _expanded(self, places: list[Place]) -> set[Place]:
        """Return the places with all of this host's addresses in the place of 0.0.0.0 and ::, which is dual-stack."""
        found: set[Place] = set()
        for scoped, port in places:
            address = scoped.partition("%")[0]
            ip = ipaddress.ip_address(address)
            if not int(ip):
                found |= {(own, port) for own in self._own if ip.version == 6 or ":" not in own}
            elif not ip.is_loopback and not is_multicast(address):
                found.add((address, port))
        return found

    def _egress(self, address: str) -> Egress:
        egress = self._ways.get(address)
        if egress is None:
            egress = self._ways[address] = self.next_hops.egress_to(address)
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

    def _way_to(self, address: str) -> Way | str:
        egress = self._egress(address)
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
        self._queues.close()


def _offloaded(settings: Settings) -> list[Stream]:
    return [stream for stream in settings.streams if stream.offload]
