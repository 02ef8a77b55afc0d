"""Notice that routes, rules, addresses, links or queues have changed (rtnetlink(7)), not which. No privilege."""

import errno
import socket
from typing import Final

SOL_NETLINK: Final = 270
NETLINK_ADD_MEMBERSHIP: Final = 1
GROUPS: Final = (1, 4, 5, 7, 8, 9, 11, 19)
"""RTNLGRP_LINK, _TC; IPv4 and IPv6: _IFADDR, _ROUTE, _RULE (linux/rtnetlink.h)."""
READS_AT_ONCE: Final = 64


class RouteChanges:
    """Counts in `version` how often something was found to have changed.

    Where this host allows no netlink sockets, changes can't be seen, so each read assumes one.
    """

    def __init__(self) -> None:
        self.version = 0
        self._events = _open()

    @property
    def blind(self) -> bool:
        """True if changes can't be seen."""
        return self._events is None

    def fileno(self) -> int:
        """Return the descriptor that is readable when events have come; -1 when changes can't be seen."""
        return self._events.fileno() if self._events else -1

    def read(self) -> None:
        """Read the events that have come."""
        self.version += self._events is None or self._drain(self._events)

    def _drain(self, events: socket.socket) -> bool:
        """Discard events, at most `READS_AT_ONCE`; return whether there were any."""
        for number in range(READS_AT_ONCE):
            try:
                events.recv(1)
            except BlockingIOError:
                return number > 0
            except OSError as error:
                if error.errno != errno.ENOBUFS:  # more events than the socket holds
                    raise
        return True

    def close(self) -> None:
        """Close the socket."""
        if self._events is not None:
            self._events.close()


def _open() -> socket.socket | None:
    try:
        events = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE)
    except OSError:
        return None
    events.bind((0, 0))  # unbound, it would get no events
    for group in GROUPS:
        events.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, group)
    return events
