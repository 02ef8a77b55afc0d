"""The applier's own check of a plan against the settings: what the planner may not ask for, whoever it is by now."""

import socket
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Final

from services.offload.applying.rules import Sources
from services.offload.kernel_plan import MAX_SHARED, Copy, KernelPlan, Prefix, StreamCopies, count_shared
from services.offload.kernel_routes import Frame, Pair
from services.offload.source_classes import MAX_RENDERED, TooManyError, divide
from shared.net.addresses import V4_MAPPED, is_inside, pack_network
from shared.settings.model import Settings

NOBODYS: Final = ("0.0.0.0/8", "127.0.0.0/8", "224.0.0.0/3", "::/127", "ff00::/8")
"""Networks that no copy comes from or goes to: this network, loopback, multicast, reserved (RFC 6890)."""
LOCAL: Final = ("169.254.0.0/16", "fe80::/10")
"""Sources that are true on their own link only: their copies are the transmitter's affair."""
GROUP_BIT: Final = 1
"""In the first byte of a MAC address: for many."""


class RefusedError(ValueError):
    """A plan that the settings do not allow."""


class Policy:
    """The bounds of the settings.

    `ours_among` returns those of some addresses that are this host's, `frames_to` the frames to some from others.
    """

    def __init__(
        self,
        settings: Settings,
        ours_among: Callable[[Iterable[bytes]], Collection[bytes]],
        frames_to: Callable[[Iterable[Pair]], Mapping[Pair, Frame]],
    ) -> None:
        self._interfaces = frozenset(settings.offload.interfaces)
        self._destinations = settings.offload.destinations
        self._original = settings.transmitter.destinations
        streams = [stream for stream in settings.streams if stream.offload]
        self._ports = {
            stream.name: {endpoint.port for endpoint in stream.endpoints if endpoint.scheme == "udp"}
            for stream in streams
        }
        self._generations = settings.offload.generations
        self._unseen = frozenset(settings.offload.unseen)
        self._ours_among = ours_among
        self._frames_to = frames_to

    def check(self, plan: KernelPlan) -> None:
        """Raise RefusedError unless every part of the plan is allowed."""
        for interface in plan.interfaces:
            if interface not in self._interfaces:
                raise RefusedError(f"interface {interface} is not in [offload] interfaces")
        for copy in plan.copies:
            self._check_copy(copy)
        for stream in plan.streams:
            self._check_stream(stream, plan)
        self._check_addresses(plan)

    def _check_addresses(self, plan: KernelPlan) -> None:
        """Only what comes to this host is copied; copies leave as the kernel's own packets do, so none is for it."""
        sources = {copy.source for copy in plan.copies if copy.source}
        listeners = {listener.address for stream in plan.streams for listener in stream.listeners}
        ours = self._ours_among(sources | listeners)
        for kind, others in (("source", sources.difference(ours)), ("listener", listeners.difference(ours))):
            for address in others:
                raise RefusedError(f"{kind} {_text(address)} is not an address of this host")
        frames = self._frames_to({(copy.address, copy.source) for copy in plan.copies})
        for copy in plan.copies:
            if frames.get((copy.address, copy.source)) != (copy.link_index, copy.next_hop, copy.link_address):
                raise RefusedError(f"copies to {_text(copy.address)} do not go the way of the kernel's routes")

    def _check_copy(self, copy: Copy) -> None:
        if len(copy.address) not in (4, 16) or len(copy.source) not in (0, len(copy.address)):
            raise RefusedError(f"addresses of {len(copy.address)} and {len(copy.source)} bytes")
        to = _text(copy.address)
        if not is_inside(to, self._destinations) or is_inside(to, NOBODYS):
            raise RefusedError(f"destination {to} is not in [offload] destinations")
        if not copy.source and not is_inside(to, self._original):
            raise RefusedError(f"destination {to} is not in [transmitter] destinations")
        if bool(copy.source) != bool(copy.source_port):
            raise RefusedError(f"source port {copy.source_port} of {len(copy.source)} bytes of address")
        if copy.next_hop[0] & GROUP_BIT or not any(copy.next_hop):
            raise RefusedError(f"next hop {copy.next_hop.hex(':')} is no station's")
        for prefix in copy.prefixes:
            if len(prefix.address) != len(copy.address) or prefix.length > 8 * len(prefix.address):
                raise RefusedError("a prefix of another IP version")

    def _check_stream(self, stream: StreamCopies, plan: KernelPlan) -> None:
        if stream.name not in self._ports:
            raise RefusedError(f"stream {stream.name} is not in the settings, or kept from offload")
        if stream.unseen and stream.name not in self._unseen:
            raise RefusedError(f"stream {stream.name} is not in [offload] unseen")
        if stream.generation > self._generations:
            raise RefusedError(f"generation {stream.generation} is not within [offload] mark_mask")
        length = len(stream.listeners[0].address)
        for listener in stream.listeners:
            if len(listener.address) != length or length not in (4, 16):
                raise RefusedError(f"listeners with addresses of {length} and {len(listener.address)} bytes")
            if listener.port not in self._ports[stream.name]:
                raise RefusedError(f"port {listener.port} is not one of a udp:// listener of stream {stream.name}")
        if any(place >= len(plan.copies) or len(plan.copies[place].address) != length for place in stream.copies):
            raise RefusedError("copies that the plan has not")
        filtered = {place: plan.copies[place].prefixes for place in stream.copies if plan.copies[place].prefixes}
        general = frozenset(stream.copies) - {*filtered}
        try:
            ranges = divide(filtered, 8 * length, MAX_RENDERED - len(general))
        except TooManyError:
            raise RefusedError(f"more than {MAX_RENDERED} copies in chains") from None
        chains = {general, *(places for _, places in ranges)}
        if count_shared([plan.copies[place] for place in sorted(places)] for places in chains) > MAX_SHARED:
            raise RefusedError(f"more than {MAX_SHARED} buckets of groups")


def _text(packed: bytes) -> str:
    return socket.inet_ntop(socket.AF_INET if len(packed) == 4 else socket.AF_INET6, packed)


def sources_of(settings: Settings) -> Sources:
    """Return the sources that the kernel's copies are not of."""
    return Sources(_prefixes(NOBODYS), _prefixes(LOCAL), _prefixes(settings.transmitter.sources))


def _prefixes(texts: tuple[str, ...]) -> tuple[Prefix, ...]:
    found = []
    for text in texts:
        packed, bits = pack_network(text)
        ipv4 = packed.startswith(V4_MAPPED) and bits >= 96
        found.append(Prefix(packed[12:], bits - 96) if ipv4 else Prefix(packed, bits))
    return tuple(found)
