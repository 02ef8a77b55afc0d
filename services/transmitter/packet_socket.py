"""A raw socket that plans are sent through: what the kernel does not take is waited for, dropped and counted."""

import errno
import select
import socket
import struct
import time
from collections import Counter
from collections.abc import Sequence
from typing import Final

from services.transmitter.headers import ETHERTYPE_IPV4, ETHERTYPE_IPV6
from services.transmitter.neighbourhood import Way, WayKind
from services.transmitter.plan import FramePlan
from services.transmitter.target import Target
from shared.ledger import (
    BUFFER_FULL,
    BYTES,
    DELIVERED,
    DROPPED,
    INTERFACE_DOWN,
    NO_ROUTE,
    QUEUE_FULL,
)
from shared.mmsg import send

SOL_PACKET: Final = 263
PACKET_VNET_HDR: Final = 15
SOCKADDR_LL: Final = struct.Struct("=HHiHBB8s")
"""family, protocol in network order, interface, and what only receivers fill in (packet(7))."""
SOCKADDR_IN: Final = struct.Struct("=HH4s8x")
SOCKADDR_IN6: Final = struct.Struct("=HHI16sI")

NO_SEGMENTATION: Final = (errno.EINVAL, errno.EMSGSIZE, errno.EIO, errno.EOPNOTSUPP)
"""What a kernel before 6.2, or a link that has become smaller, says to a run that is to be cut."""
STOPS: Final = {
    errno.EAGAIN: BUFFER_FULL,
    errno.ENOBUFS: QUEUE_FULL,
    **dict.fromkeys((errno.ENETDOWN, errno.ENXIO, errno.ENODEV), INTERFACE_DOWN),
    **dict.fromkeys((errno.ENETUNREACH, errno.EHOSTUNREACH), NO_ROUTE),
}
"""Errors that the next frame would meet too: the rest of the plan is dropped under this cause."""
MAX_SKIPS: Final = 16
"""Units of a plan that may fail one by one before the rest is dropped with them."""
PATIENCE_SECONDS: Final = 0.02
"""How long a plan may wait for its interface; once that was in vain, nothing waits there until a send succeeds."""
QUEUE_PAUSE_SECONDS: Final = 0.0005
"""Between tries at a queue that is full: it tells nobody when it has room again."""


class PacketSocket:
    """One raw socket, of AF_PACKET with PACKET_VNET_HDR or of raw IP, shared by the collectors behind one interface."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self.segmentation = sock.family == socket.AF_PACKET
        if sock.family == socket.AF_PACKET:
            sock.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
        self._stuck = False

    def name(self, target: Target) -> bytes:
        """The socket address that messages to a collector carry."""
        if self._socket.family == socket.AF_PACKET:
            ethertype = ETHERTYPE_IPV4 if target.version == 4 else ETHERTYPE_IPV6
            protocol = socket.htons(ethertype)
            return SOCKADDR_LL.pack(socket.AF_PACKET, protocol, target.link_index, 0, 0, 6, target.ethernet[:6])
        if target.version == 4:
            return SOCKADDR_IN.pack(socket.AF_INET, 0, target.address)
        return SOCKADDR_IN6.pack(socket.AF_INET6, 0, 0, target.address, 0)

    def send(self, plan: FramePlan, account: Counter[str]) -> int:
        """Send what is planned and addressed; return how many rows were dealt with, delivered or dropped.

        Fewer than all means that runs were refused from there on: plan the rest again without segmentation.
        """
        deadline = 0.0
        at, skips, stop = 0, 0, plan.units
        dropped: Counter[str] = Counter()
        lost_bytes = 0
        while at < plan.frames:
            taken, error = send(self._socket.fileno(), plan.messages, at, plan.frames)
            at += taken
            if taken:
                self._stuck = False
                continue
            if error in (errno.EAGAIN, errno.ENOBUFS) and not self._stuck:
                now = time.monotonic()
                deadline = deadline or now + PATIENCE_SECONDS
                if now < deadline:
                    self._wait(error, deadline - now)
                    continue
                self._stuck = True
            unit = plan.unit_of(at)
            if error in NO_SEGMENTATION and plan.segmented(unit):
                self.segmentation, stop = False, unit
                break
            last = plan.units if error in STOPS or skips == MAX_SKIPS else unit + 1
            dropped[STOPS.get(error) or cause_of(error)] += int(plan.rows_before[last] - plan.rows_before[unit])
            lost_bytes += int(plan.bytes_before[last] - plan.bytes_before[unit])
            at, skips = plan.first_frame(last), skips + 1
        dealt = int(plan.rows_before[stop])
        account.update(dropped)
        account[DELIVERED] += dealt - dropped.total()
        account[BYTES] += int(plan.bytes_before[stop]) - lost_bytes
        return dealt

    def _wait(self, error: int, seconds: float) -> None:
        if error == errno.ENOBUFS:
            time.sleep(min(seconds, QUEUE_PAUSE_SECONDS))
            return
        poller = select.poll()
        poller.register(self._socket, select.POLLOUT)
        poller.poll(int(seconds * 1000) + 1)

    def refresh(self) -> None:
        """Try segmentation again: the link that refused it may have changed."""
        self.segmentation = self._socket.family == socket.AF_PACKET


def cause_of(error: int) -> str:
    """The name under which what failed with an errno is counted."""
    return DROPPED + errno.errorcode.get(error, str(error)).lower()


class Exits:
    """All raw sockets: an interface has one for its copies, to itself as long as there are enough."""

    def __init__(
        self, packet: Sequence[socket.socket], ip4: Sequence[socket.socket], ip6: Sequence[socket.socket]
    ) -> None:
        frames = [PacketSocket(sock) for sock in packet]
        self._pools = {
            (4, WayKind.FRAMES): frames,
            (6, WayKind.FRAMES): frames,
            (4, WayKind.PACKETS): [PacketSocket(sock) for sock in ip4],
            (6, WayKind.PACKETS): [PacketSocket(sock) for sock in ip6],
        }

    def of(self, way: Way, version: int) -> PacketSocket:
        """The socket for a way."""
        pool = self._pools[version, way.kind]
        return pool[(way.link.index if way.link else 0) % len(pool)]

    def refresh(self) -> None:
        """Try segmentation again. Due every second."""
        for pool in self._pools.values():
            for exit_ in pool:
                exit_.refresh()
