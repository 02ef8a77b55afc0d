"""What the errno of a failed send stands for: the cause that is counted, and what may be done about it. No I/O."""

import errno
from collections.abc import Mapping
from typing import Final

from shared.ledger import (
    BUFFER_FULL,
    DROPPED,
    INTERFACE_DOWN,
    NO_ROUTE,
    NOT_CONNECTED,
    QUEUE_FULL,
    REFUSED,
)

NO_SEGMENTATION: Final = (errno.EIO, errno.EINVAL, errno.EMSGSIZE, errno.EOPNOTSUPP)
"""A run of datagrams can't be cut: by this kernel, this device, or for a path that has become smaller
(linux/net/ipv4/udp.c, udp_send_skb; linux/net/packet/af_packet.c)."""
NO_ROOM: Final = (errno.EAGAIN, errno.ENOBUFS)
"""There is no room just now, in the socket's buffer or in the interface's queue; a moment later there may be."""
NO_INTERFACE: Final = (errno.ENETDOWN, errno.ENXIO, errno.ENODEV)
NO_WAY: Final = (errno.ENETUNREACH, errno.EHOSTUNREACH)
RELAY_CAUSES: Final[Mapping[int, str]] = {
    **dict.fromkeys(NO_ROOM, BUFFER_FULL),
    **dict.fromkeys((*NO_WAY, errno.ENETDOWN, errno.EADDRNOTAVAIL), NOT_CONNECTED),
    errno.ECONNREFUSED: REFUSED,
}
"""By a connected socket: the collector's next datagram would meet these too."""
RAW_CAUSES: Final[Mapping[int, str]] = {
    errno.EAGAIN: BUFFER_FULL,
    errno.ENOBUFS: QUEUE_FULL,
    **dict.fromkeys(NO_INTERFACE, INTERFACE_DOWN),
    **dict.fromkeys(NO_WAY, NO_ROUTE),
}
"""By a raw socket: the collector's next frame would meet these too."""
MAX_SKIPS: Final = 16
"""Datagrams of a batch that may fail one by one, for whatever else, before the rest is dropped with them."""


def cause_of(error: int, causes: Mapping[int, str]) -> str:
    """Return the name under which what failed with an errno is counted; one not among `causes` is its own name."""
    return causes.get(error) or DROPPED + errno.errorcode.get(error, str(error)).lower()
