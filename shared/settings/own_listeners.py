"""Our own UDP listeners, as addresses: copies sent to one of them would come back to us."""

import contextlib
import ipaddress
import math
import socket
from collections.abc import Callable, Iterable, Iterator
from typing import Final

from shared.net.addresses import Endpoint, resolve
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
    return [(address, endpoint.port) for endpoint in _udp(streams) for address in _addresses_of(endpoint.host)]


def _udp(streams: Iterable[Stream]) -> Iterator[Endpoint]:
    return (endpoint for stream in streams for endpoint in stream.endpoints if endpoint.scheme == "udp")


def _addresses_of(host: str) -> tuple[str, ...]:
    with contextlib.suppress(OSError):
        return tuple(str(at[0]) for _, at in resolve(host, 0, socket.SOCK_DGRAM))
    return ()


def _is_name(host: str) -> bool:
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(host.partition("%")[0])
        return False
    return True


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


class FollowedListeners:
    """The listeners of streams, for a loop that can't wait for a resolver: names are looked up in threads.

    A name without an answer keeps its former addresses, and is looked up again.
    """

    def __init__(self, streams: Iterable[Stream]) -> None:
        self._addresses: dict[str, tuple[str, ...]] = {}
        self.use(streams)
        self._lookups.wait(START_SECONDS)
        self._put_together()

    @property
    def settled(self) -> bool:
        """True once each name has been looked up, or is late: until then call `tick` soon again."""
        return self._lookups.settled

    def use(self, streams: Iterable[Stream]) -> None:
        """Look up the listeners of these streams."""
        self._places = {(endpoint.host, endpoint.port) for endpoint in _udp(streams)}
        self._lookups = HostLookups(math.inf)
        self._lookups.follow(host for host, _ in self._places if _is_name(host))
        self._lookups.tick()
        self._put_together()

    def tick(self) -> None:
        """Take the answers that have come, and ask again where none has; due each second."""
        if self._lookups.tick():
            self._put_together()

    def _put_together(self) -> None:
        before, self._addresses = self._addresses, {}
        for host in {host for host, _ in self._places}:
            found = self._lookups[host].addresses or before.get(host, ())
            self._addresses[host] = found if _is_name(host) else _addresses_of(host)
        self.now = OwnListeners((address, port) for host, port in self._places for address in self._addresses[host])
