"""A raw socket that plans are sent through: what the kernel does not take is waited for, dropped and counted."""

import errno
import socket
import struct
import time
from collections import Counter
from collections.abc import Sequence
from typing import Final

import numpy as np

from services.transmitter.addressing import Target
from services.transmitter.few import FewFrames, Frame
from services.transmitter.headers import ETHERTYPE_IPV4, ETHERTYPE_IPV6
from services.transmitter.next_hops import Way, WayKind
from services.transmitter.plan import FramePlan
from shared.datagrams.mmsg import send
from shared.ledger import (
    BUFFER_FULL,
    BYTES,
    DELIVERED,
    DROPPED,
    INTERFACE_DOWN,
    NO_ROUTE,
    QUEUE_FULL,
)

SOL_PACKET: Final = 263
PACKET_VNET_HDR: Final = 15
SOCKADDR_LL: Final = struct.Struct("=HHiHBB8s")
"""family, protocol in network order, interface, and what only receivers fill in (packet(7))."""
SOCKADDR_IN: Final = struct.Struct("=HH4s8x")
SOCKADDR_IN6: Final = struct.Struct("=HHI16sI")

NO_SEGMENTATION: Final = (errno.EINVAL, errno.EMSGSIZE, errno.EIO, errno.EOPNOTSUPP)
"""What a kernel before 6.2, or a link that has become smaller, says to a run that is to be cut."""
FULL: Final = {errno.EAGAIN: BUFFER_FULL, errno.ENOBUFS: QUEUE_FULL}
"""What may be different a moment later."""
STOPS: Final = {
    **FULL,
    **dict.fromkeys((errno.ENETDOWN, errno.ENXIO, errno.ENODEV), INTERFACE_DOWN),
    **dict.fromkeys((errno.ENETUNREACH, errno.EHOSTUNREACH), NO_ROUTE),
}
"""Errors that the collector's next frame would meet too: the rest of its part is dropped under this cause."""
MAX_SKIPS: Final = 16
"""Units of a part that may fail one by one before the rest is dropped with them."""
PATIENCE_SECONDS: Final = 0.02
PATIENCE_SHARE: Final = 10
"""An interface that is full is waited for: so long in a row, and for one part in so many of the time. All other copies
wait with it."""
PAUSE_SECONDS: Final = 0.0005
"""Between tries at what is full: a queue tells nobody when it has room again, and poll(2) does not wait where raw IP
has an error that nobody reads."""


class PacketSocket:
    """One raw socket, of AF_PACKET with PACKET_VNET_HDR or of raw IP, shared by the collectors behind one interface."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self.segmentation = sock.family == socket.AF_PACKET
        if sock.family == socket.AF_PACKET:
            sock.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
        self._patience = PATIENCE_SECONDS
        self._patience_at = time.monotonic()

    def name(self, target: Target) -> bytes:
        """The socket address that messages to a collector carry."""
        if self._socket.family == socket.AF_PACKET:
            ethertype = ETHERTYPE_IPV4 if target.version == 4 else ETHERTYPE_IPV6
            protocol = socket.htons(ethertype)
            return SOCKADDR_LL.pack(socket.AF_PACKET, protocol, target.link_index, 0, 0, 6, target.ethernet[:6])
        if target.version == 4:
            return SOCKADDR_IN.pack(socket.AF_INET, 0, target.address)
        return SOCKADDR_IN6.pack(socket.AF_INET6, 0, 0, target.address, 0)

    def send(self, plan: FramePlan, accounts: Sequence[Counter[str]]) -> int:
        """Send what is planned and addressed, each part on its account; return how many rows were dealt with.

        They were delivered or dropped. Fewer than all means that runs were refused from there on: plan the rest again
        without segmentation.
        """
        at, skips, stop = 0, 0, plan.units
        forgiven = self._socket.family == socket.AF_PACKET
        dropped: list[tuple[int, int, str]] = []
        while at < plan.frames:
            taken, error = send(self._socket.fileno(), plan.messages, at, plan.frames)
            at += taken
            if taken:
                continue
            if error in FULL:
                if self._wait():
                    continue
            elif not forgiven:
                # With IP_RECVERR an ICMP error, to whatever packet, is what the next send ends with: it says nothing
                # of this one. One that does will come again.
                forgiven = True
                continue
            unit = plan.unit_of(at)
            if error in NO_SEGMENTATION and plan.segmented(unit):
                self.segmentation, stop = False, unit
                break
            last, skips = unit + 1, skips + 1
            if error in STOPS or skips > MAX_SKIPS:  # the next collector's may leave all the same
                last, skips = int(plan.first_units[plan.part_of(unit) + 1]), 0
            dropped.append((unit, last, STOPS.get(error) or cause_of(error)))
            at = plan.first_frame(last)
        _account(plan, stop, dropped, accounts)
        return int(plan.rows_before[stop])

    def send_few(self, few: FewFrames, frames: list[Frame], account: Counter[str]) -> int:
        """Send frames to one collector; return how many have left. The rest is for `send`, which handles errors."""
        taken, _ = send(self._socket.fileno(), few.messages, 0, len(frames))
        left = frames if taken == len(frames) else frames[:taken]
        account[DELIVERED] += sum([len(frame.rows) for frame in left])
        account[BYTES] += sum([frame.size for frame in left])
        return taken

    def _wait(self) -> bool:
        """Give the interface a moment, unless it has had its part of the time; return whether it was given one."""
        began = time.monotonic()
        self._patience = min(PATIENCE_SECONDS, self._patience + (began - self._patience_at) / PATIENCE_SHARE)
        self._patience_at = began
        if self._patience < PAUSE_SECONDS:
            return False
        time.sleep(PAUSE_SECONDS)
        self._patience -= time.monotonic() - began
        return True

    def refresh(self) -> None:
        """Try segmentation again: the link that refused it may have changed."""
        self.segmentation = self._socket.family == socket.AF_PACKET


def _account(
    plan: FramePlan, stop: int, dropped: Sequence[tuple[int, int, str]], accounts: Sequence[Counter[str]]
) -> None:
    """Count units before `stop` as delivered, but those from one to another, all of one part, that were dropped."""
    bounds = np.minimum(plan.first_units, stop)
    rows, sizes = np.diff(plan.rows_before[bounds]).tolist(), np.diff(plan.bytes_before[bounds]).tolist()
    for first, last, cause in dropped:
        part = plan.part_of(first)
        lost = int(plan.rows_before[last] - plan.rows_before[first])
        accounts[part][cause] += lost
        rows[part] -= lost
        sizes[part] -= int(plan.bytes_before[last] - plan.bytes_before[first])
    for account, delivered, size in zip(accounts, rows, sizes, strict=True):
        account[DELIVERED] += delivered
        account[BYTES] += size


def cause_of(error: int) -> str:
    """The name under which what failed with an errno is counted."""
    return DROPPED + errno.errorcode.get(error, str(error)).lower()


class Exits:
    """All raw sockets: an interface has one for its copies, to itself as long as there are enough."""

    def __init__(
        self, packet: Sequence[socket.socket], ip4: Sequence[socket.socket], ip6: Sequence[socket.socket]
    ) -> None:
        frames = _Pool(packet)
        self._pools = {
            (4, WayKind.FRAMES): frames,
            (6, WayKind.FRAMES): frames,
            (4, WayKind.PACKETS): _Pool(ip4),
            (6, WayKind.PACKETS): _Pool(ip6),
        }

    def lead(self, way: Way, version: int) -> bool:
        """Whether there is a socket for a way; a host without IPv6 has none for its packets."""
        return bool(self._pools[version, way.kind].exits)

    def of(self, way: Way, version: int) -> PacketSocket:
        """The socket for a way."""
        return self._pools[version, way.kind].of(way.link.index if way.link else 0)

    def refresh(self) -> None:
        """Try segmentation again. Due every second."""
        for pool in self._pools.values():
            for exit_ in pool.exits:
                exit_.refresh()


class _Pool:
    """Sockets of one kind, given to interfaces as they are first used; in turn again when there are no more."""

    def __init__(self, sockets: Sequence[socket.socket]) -> None:
        self.exits = [PacketSocket(sock) for sock in sockets]
        self._of_link: dict[int, PacketSocket] = {}

    def of(self, link_index: int) -> PacketSocket:
        if link_index not in self._of_link:
            self._of_link[link_index] = self.exits[len(self._of_link) % len(self.exits)]
        return self._of_link[link_index]
