"""Whether copies sent somewhere would come back to us: our own UDP listeners, as addresses."""

import contextlib
import ipaddress
import socket

from shared.addresses import resolve
from shared.settings import Settings


class OwnListeners:
    """The address and port of every UDP listener of every stream; a host name that is not known has none."""

    def __init__(self, settings: Settings) -> None:
        self._found: list[tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, int]] = []
        for endpoint in (endpoint for stream in settings.streams for endpoint in stream.endpoints):
            if endpoint.scheme == "udp":
                with contextlib.suppress(OSError):
                    for _, at in resolve(endpoint.host, endpoint.port, socket.SOCK_DGRAM):
                        self._found.append((ipaddress.ip_address(at[0]), endpoint.port))

    def take(self, address: str, port: int, *, local: bool) -> bool:
        """Whether one of them receives what is sent to an address, which is `local` when it is this host's."""
        where = ipaddress.ip_address(address)
        return any(
            port == own_port
            and (where == own or (local and not int(own) and own.version in (where.version, 6)))  # [::] is dual-stack
            for own, own_port in self._found
        )
