"""Our own UDP listeners, as addresses: copies sent to one of them would come back to us."""

import contextlib
import ipaddress
import math
import socket
from collections.abc import Callable, Iterable, Iterator
from typing import Final, Self

from shared.net.addresses import Endpoint, begin_lookups, is_name, resolve
from shared.net.host_lookups import HostLookups
from shared.settings.entries import Stream
from shared.settings.model import Settings

START_SECONDS: Final = 5.0
"""Time for the names of listeners to be looked up at a start."""


def udp_listeners(settings: Settings) -> list[tuple[str, int]]:
    """Return address and port of every UDP listener of every stream; an unknown host name has none."""
    return listening_addresses(settings.streams)


def listening_addresses(streams: Iterable[Stream]) -> list[tuple[str, int]]:
    """Return address and port of every UDP listener of these streams; an unknown host name has none."""
    endpoints = [*_udp(streams)]
    begin_lookups(endpoint.host for endpoint in endpoints)
    return [(address, endpoint.port) for endpoint in endpoints for address in _addresses_of(endpoint.host)]


def _udp(streams: Iterable[Stream]) -> Iterator[Endpoint]:
    return (endpoint for stream in streams for endpoint in stream.endpoints if endpoint.scheme == "udp")


def _addresses_of(host: str) -> tuple[str, ...]:
    with contextlib.suppress(OSError):
        return tuple(str(at[0]) for _, at in resolve(host, 0, socket.SOCK_DGRAM))
    return ()


class OwnListeners:
    """Listeners by address and port, which tell whether they receive what is sent to an address. No I/O."""

    def __init__(self, listeners: Iterable[tuple[str, int]]) -> None:
        self._listeners = tuple((ipaddress.ip_address(address), port) for address, port in listeners)

    def receive(self, address: str, port: int, is_local: Callable[[str], bool]) -> bool:
        """Return whether one of them receives it; `is_local` says whether an address is this host's."""
        for listener, listener_port in self._listeners:
            if port != listener_port:
                continue
            where = ipaddress.ip_address(address)
            covers = not int(listener) and listener.version in (where.version, 6)  # [::] is dual-stack
            if where == listener or (covers and is_local(address)):
                return True
        return False


class FollowedListeners(OwnListeners):
    """The listeners of streams, for a loop that can't wait for a resolver: names are looked up in threads.

    A name without an answer has the addresses that it had `before`, and is looked up again. A start, which has no
    `before`, waits a while for answers.
    """

    _addresses: dict[str, tuple[str, ...]]
    """By host."""

    def __init__(self, streams: Iterable[Stream], before: Self | None = None) -> None:
        self._endpoints = {stream.name: tuple(_udp([stream])) for stream in streams}
        hosts = {endpoint.host for endpoints in self._endpoints.values() for endpoint in endpoints}
        known = before._addresses if before else {}
        self._addresses = {host: known.get(host, ()) if is_name(host) else _addresses_of(host) for host in hosts}
        self._lookups = HostLookups(math.inf)
        self._lookups.follow(host for host in hosts if is_name(host))
        if before is None:
            self._lookups.wait(START_SECONDS)
        self.tick()
        self._put_together()

    @property
    def settled(self) -> bool:
        """True once each name has been looked up, or is late: until then call `tick` soon again."""
        return self._lookups.settled

    def tick(self) -> bool:
        """Take the answers that have come, and ask again where none has; return whether addresses are others now.

        Due each second.
        """
        return bool(self._lookups.tick()) and self._put_together()

    def _put_together(self) -> bool:
        before = dict(self._addresses)
        for host in before:
            self._addresses[host] = self._lookups[host].addresses or before[host]
        self.places = {
            stream: [(address, endpoint.port) for endpoint in endpoints for address in self._addresses[endpoint.host]]
            for stream, endpoints in self._endpoints.items()
        }
        """Address and port of every UDP listener, by stream."""
        super().__init__(place for places in self.places.values() for place in places)
        return before != self._addresses
