"""Multicast groups: how to recognise them, and how a socket joins one on an interface (ip(7), ipv6(7))."""

import errno
import ipaddress
import socket
import struct
from typing import Final

IP_MULTICAST_ALL: Final = 49
IPV6_MULTICAST_ALL: Final = 29
"""Unless this is switched off, a socket also gets the groups that any other process of this host has joined."""
MREQN: Final = struct.Struct("=4s4xi")
"""struct ip_mreqn: the group, and the interface's index; 0: the one that the routing table has for it."""
MREQ6: Final = struct.Struct("=16si")
"""struct ipv6_mreq, likewise."""


def is_multicast(host: str) -> bool:
    """Return whether a host is a multicast address, with or without an interface.

    >>> is_multicast("239.1.1.1%eth0"), is_multicast("ff05::1"), is_multicast("localhost")
    (True, True, False)
    """
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_multicast
    except ValueError:
        return False


def join_group(sock: socket.socket, host: str) -> bool:
    """Join the group `host`, written with its interface as in `239.1.1.1%eth0`; return whether it was not joined yet.

    OSError when there is no such interface, or when no interface is named and no route leads to the group.
    """
    group, _, interface = host.partition("%")
    index = socket.if_nametoindex(interface) if interface else 0
    packed = ipaddress.ip_address(group).packed
    try:
        if sock.family == socket.AF_INET:
            sock.setsockopt(socket.IPPROTO_IP, IP_MULTICAST_ALL, 0)
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, MREQN.pack(packed, index))
        else:
            sock.setsockopt(socket.IPPROTO_IPV6, IPV6_MULTICAST_ALL, 0)
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, MREQ6.pack(packed, index))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:  # joined already, on this interface
            return False
        raise
    return True
