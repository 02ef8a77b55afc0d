"""Shares of the connections that a service may have open: by address, and some for addresses that have none. No I/O."""

import ipaddress
from typing import Final

AF_UNIX: Final = "AF_UNIX"
"""The origin of every connection that has no address."""
KEPT: Final = 8
"""One in so many connections is kept for origins that have none, and one for this host."""


def origin_of(address: str) -> str:
    """Return the origin that shares the limits of one address: an IPv4 address, 64 bits of IPv6, AF_UNIX for "".

    >>> origin_of("2001:db8::1:2"), origin_of("::ffff:192.0.2.1"), origin_of("fe80::1%eth0")
    ('2001:db8::/64', '192.0.2.1', 'fe80::/64')
    """
    if not address:
        return AF_UNIX
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(parsed, ipaddress.IPv4Address) or parsed.is_loopback:
        return str(parsed)
    # A host has all 64 bits to itself (RFC 8981).
    return str(parsed.ipv4_mapped or ipaddress.ip_network((str(parsed), 64), strict=False))


def is_this_host(origin: str) -> bool:
    """Return whether connections of an origin come from this host."""
    return origin == AF_UNIX or ("/" not in origin and ipaddress.ip_address(origin).is_loopback)


def limit_of(origin: str, limit: int, *, first: bool) -> int:
    """Return up to how many connections there may be in all for one of this origin to be admitted.

    `limit` is that for this host. One that is not the `first` of its origin leaves room for origins that have none.

    >>> [limit_of("127.0.0.1", 80, first=False)] + [limit_of("192.0.2.1", 80, first=first) for first in (True, False)]
    [80, 70, 60]
    """
    return limit if is_this_host(origin) else limit - limit // KEPT * (1 if first else 2)
