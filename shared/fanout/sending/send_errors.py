"""Errnos of failed sends, of both senders: the cause that each is counted under, and each logged once. No socket."""

import errno
import os
from collections.abc import Mapping
from typing import Final

from shared.ledger.counters import BUFFER_FULL, DROPPED, INTERFACE_DOWN, NO_ROUTE, NOT_CONNECTED, QUEUE_FULL, REFUSED
from shared.log import get_logger

log = get_logger()

NO_ROOM: Final = (errno.EAGAIN, errno.ENOBUFS)
"""There is no room now, in the socket's buffer or in the interface's queue; a moment later there may be."""
NO_INTERFACE: Final = (errno.ENETDOWN, errno.ENXIO, errno.ENODEV)
NO_WAY: Final = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EHOSTDOWN, errno.ENONET, errno.EACCES)
"""Errnos that a route or an ICMP error leads to; the last where a firewall or a route prohibits it
(linux/net/ipv4/icmp.c, icmp_err_convert; linux/net/ipv6/icmp.c, tab_unreach)."""

RELAY_CAUSES: Final[Mapping[int, str]] = {
    **dict.fromkeys(NO_ROOM, BUFFER_FULL),
    **dict.fromkeys((*NO_WAY, errno.ENETDOWN, errno.EADDRNOTAVAIL), NOT_CONNECTED),
    **dict.fromkeys((errno.ECONNREFUSED, errno.ENOPROTOOPT), REFUSED),
}
"""Errors of a connected socket that the collector's next datagram would meet too."""
RAW_CAUSES: Final[Mapping[int, str]] = {
    errno.EAGAIN: BUFFER_FULL,
    errno.ENOBUFS: QUEUE_FULL,
    **dict.fromkeys(NO_INTERFACE, INTERFACE_DOWN),
    **dict.fromkeys(NO_WAY, NO_ROUTE),
}
"""Errors of a raw socket that the collector's next frame would meet too."""
MAX_SKIPS: Final = 16
"""Datagrams of a batch that may fail one by one, for any other reason, before the rest is dropped with them."""


def cause_of(error: int, causes: Mapping[int, str]) -> str:
    """Return the name under which a failure with an errno is counted; one not among `causes` is its own name."""
    return causes.get(error) or DROPPED + errno.errorcode.get(error, str(error)).lower()


class SaidErrors:
    """Logs each errno that a collector's copies meet once, so that none is only a number that grows."""

    def __init__(self, collector: str) -> None:
        self._collector = collector
        self._said: set[tuple[str, int]] = set()

    def say(self, event: str, error: int) -> None:
        """Log an event, unless it was logged with this errno before."""
        if (event, error) not in self._said:
            self._said.add((event, error))
            name = errno.errorcode.get(error, str(error))
            log.warning(event, collector=self._collector, error=os.strerror(error), errno=name)
