"""The client at the other end of a connection, and the connections with which it shares limits."""

import asyncio
import ipaddress
import socket
from dataclasses import dataclass

from services.gateway.admission.rights import HERE, Rights
from shared.net.connection_shares import origin_of
from shared.net.sockets import peer_credentials


@dataclass(frozen=True, slots=True)
class Peer:
    """The other end of a connection: the connection's number (0: one of an earlier start), its address and its port.

    `uid` is the user at the other end of an AF_UNIX connection. For an earlier start, the rights have only the holder.
    """

    id: int
    address: str
    port: int
    rights: Rights = HERE
    uid: int | None = None

    def __str__(self) -> str:
        where = f"{self.address} port {self.port}" if self.uid is None else f"this host, user {self.uid}"
        return f"{where}, by {self.rights.holder!r}" if self.rights.holder else where

    @property
    def origin(self) -> str:
        """The origin whose limits its connection shares."""
        return origin_of(self.address if self.port else "")

    def controls(self, other: "Peer") -> bool:
        """Return whether this peer may change the entries of the other: it has the same holder, or every right."""
        own = self.rights.holder != "" and self.rights.holder == other.rights.holder
        return own or self.rights.everything

    def is_client_of(self, other: "Peer") -> bool:
        """Return whether both are one client, by the same holder, or by the same address where neither has a holder."""
        if self.rights.holder or other.rights.holder:
            return self.rights.holder == other.rights.holder
        return self.address == other.address


def identify(transport: asyncio.Transport, number: int, rights: Rights) -> Peer:
    """Return the peer of a transport: IPv4 where it is mapped, without a scope, 127.0.0.1 for AF_UNIX."""
    sock = transport.get_extra_info("socket")
    if sock.family == socket.AF_UNIX:
        _, uid, _ = peer_credentials(sock)
        return Peer(number, "127.0.0.1", 0, rights, uid)
    host, port = transport.get_extra_info("peername")[:2]
    address = ipaddress.ip_address(host.partition("%")[0])
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return Peer(number, str(mapped or address), port, rights)
