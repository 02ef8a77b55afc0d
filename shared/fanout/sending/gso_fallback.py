"""Segmentation offload (UDP_SEGMENT, UDP_L4), and the fallback: datagrams one by one where runs are refused."""

import errno
from typing import Final

REFUSALS: Final = (errno.EIO, errno.EINVAL, errno.EMSGSIZE, errno.EOPNOTSUPP)
"""A run can't be cut: by this kernel, this device, or for a path that has become smaller (linux/net/ipv4/udp.c,
udp_send_skb; linux/net/packet/af_packet.c)."""


class GsoFallback:
    """The state of segmentation: usable where `offered`, until a run was refused or it is tried again."""

    def __init__(self, *, offered: bool) -> None:
        self.usable = self._offered = offered

    def refused_by(self, error: int) -> bool:
        """Return whether the errno of a run means that runs are refused; if so, they are not `usable` from now on."""
        refused = error in REFUSALS
        self.usable &= not refused
        return refused

    def try_again(self) -> None:
        """Use runs again: the path, its device or its MTU may have changed."""
        self.usable = self._offered
