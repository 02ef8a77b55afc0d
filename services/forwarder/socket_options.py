"""A collector's socket as it is opened: hop limit and DSCP of its copies, fragmentation, send buffer, error reports."""

import socket
from typing import Final

from shared.client import Client
from shared.net.sockets import enlarge_send_buffer

HEADER_OPTIONS: Final = {
    socket.AF_INET: ((socket.IPPROTO_IP, socket.IP_TTL), (socket.IPPROTO_IP, socket.IP_TOS)),
    socket.AF_INET6: (
        (socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS),
        (socket.IPPROTO_IPV6, socket.IPV6_TCLASS),
    ),
}
"""Options for hop limit, and for DSCP with the two bits below it, which are not ours."""
RECVERR: Final = {socket.AF_INET: (socket.IPPROTO_IP, 11), socket.AF_INET6: (socket.IPPROTO_IPV6, 25)}
"""IP_RECVERR, IPV6_RECVERR: without it the kernel hides that an interface's queue was full, or that no host answers."""
MTU_DISCOVER: Final = {socket.AF_INET: (socket.IPPROTO_IP, 10), socket.AF_INET6: (socket.IPPROTO_IPV6, 23)}
"""IP_MTU_DISCOVER, IPV6_MTU_DISCOVER. By default copies carry the flag DF: where a link on the way is smaller, a router
drops them, and this host does not learn of it if ICMP is filtered."""
PMTUDISC_DONT: Final = 0
"""Routers cut longer packets (IPv4); this host cuts by the smallest MTU that it knows of the path (both families)."""
MTU: Final = {socket.AF_INET: (socket.IPPROTO_IP, 14), socket.AF_INET6: (socket.IPPROTO_IPV6, 24)}
"""IP_MTU, IPV6_MTU."""
HEADERS: Final = {socket.AF_INET: 28, socket.AF_INET6: 48}
"""Bytes of IP and UDP header."""


def open_socket(client: Client, send_buffer: int) -> socket.socket:
    """Return a non-blocking socket that is connected to a collector. OSError when there is no way to it now."""
    sock = socket.socket(_family(client), socket.SOCK_DGRAM)
    try:
        sock.setblocking(False)
        enlarge_send_buffer(sock, send_buffer)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 0)  # never read: neither answers nor errors pile up
        sock.setsockopt(*RECVERR[sock.family], 1)
        sock.setsockopt(*MTU_DISCOVER[sock.family], PMTUDISC_DONT)
        mark_headers(sock, client)
        sock.connect(client.socket_address)
    except OSError:
        sock.close()
        raise
    return sock


def mark_headers(sock: socket.socket, client: Client) -> None:
    """Give a collector's copies its hop limit and DSCP."""
    for option, value in zip(HEADER_OPTIONS[sock.family], (client.hop_limit, client.dscp << 2), strict=True):
        sock.setsockopt(*option, value)


def source_of_new_socket(client: Client) -> str:
    """Return the address that a socket opened now would send from. OSError when there is no way to the collector."""
    with socket.socket(_family(client), socket.SOCK_DGRAM) as probe:
        probe.connect(client.socket_address)
        return str(probe.getsockname()[0])


def path_mtu(sock: socket.socket) -> int:
    """Return the MTU of the path, as the kernel knows it now. OSError when its route is gone."""
    return sock.getsockopt(*MTU[sock.family])


def _family(client: Client) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in client.address else socket.AF_INET
