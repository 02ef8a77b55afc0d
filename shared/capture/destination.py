"""Destinations of datagrams, for headers that are made for them: a batch does not know where it came to."""

import socket
from collections.abc import Iterable
from contextlib import suppress

from shared.capture.pcapng import UNKNOWN4, UNKNOWN6, Destination
from shared.net.addresses import Endpoint, pack_address, resolve


def destination_at(*places: tuple[str, int]) -> Destination:
    """Return the destination of datagrams that came to these addresses; an unspecified one stays unknown."""
    four = [pack_unscoped(address) for address, _ in places if ":" not in address]
    six = [pack_unscoped(address) for address, _ in places if ":" in address]
    return Destination(places[0][1] if places else 0, *four[:1] or [UNKNOWN4], *six[:1] or [UNKNOWN6])


def destination_of(listeners: Iterable[Endpoint]) -> Destination:
    """Return the destination of datagrams of a stream, which has these listeners."""
    places = []
    for endpoint in listeners:
        if endpoint.scheme == "udp":
            with suppress(OSError):
                found = resolve(endpoint.host, endpoint.port, socket.SOCK_DGRAM)
                places += [(str(at[0]), endpoint.port) for _, at in found]
    return destination_at(*places)


def pack_unscoped(address: str) -> bytes:
    """Return the 16 bytes of an address without its scope, for which headers have no room."""
    return pack_address(address.partition("%")[0])
