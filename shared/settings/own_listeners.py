"""Our own UDP listeners, as addresses: copies sent to one of them would come back to us."""

import contextlib
import ipaddress
import socket
from collections.abc import Callable, Iterable

from shared.net.addresses import resolve
from shared.settings.entries import Stream
from shared.settings.model import Settings


def udp_listeners(settings: Settings) -> list[tuple[str, int]]:
    """Return address and port of every UDP listener of every stream; an unknown host name has none."""
    return listening_addresses(settings.streams)


def listening_addresses(streams: Iterable[Stream]) -> list[tuple[str, int]]:
    """Return address and port of every UDP listener of these streams; an unknown host name has none."""
    found: list[tuple[str, int]] = []
    for endpoint in (endpoint for stream in streams for endpoint in stream.endpoints):
        if endpoint.scheme == "udp":
            with contextlib.suppress(OSError):
                found += [
                    (str(at[0]), endpoint.port) for _, at in resolve(endpoint.host, endpoint.port, socket.SOCK_DGRAM)
                ]
    return found


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
