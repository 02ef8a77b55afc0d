"""A raw socket that sends plans: it waits for frames that the kernel does not take, or drops and counts them."""

import socket
import struct
import time
from collections import Counter
from collections.abc import Sequence
from typing import Final

import numpy as np

from services.transmitter.destination import Destination
from services.transmitter.few_rows import FewFrames, Frame
from services.transmitter.packets.addressing import Addressing
from services.transmitter.packets.headers import ETHERTYPE_IPV4, ETHERTYPE_IPV6
from services.transmitter.plan import FramePlan
from shared.datagrams.mmsg import send
from shared.fanout.sending.gso_fallback import GsoFallback
from shared.fanout.sending.next_hops import Egress, EgressKind
from shared.fanout.sending.send_errors import MAX_SKIPS, NO_ROOM, RAW_CAUSES, cause_of
from shared.ledger.counters import BYTES, SENT

SOL_PACKET: Final = 263
PACKET_VNET_HDR: Final = 15
SOCKADDR_LL: Final = struct.Struct("=HHiHBB8s")
"""family, protocol in network order, interface, and fields that only receivers fill in (packet(7))."""
SOCKADDR_IN: Final = struct.Struct("=HH4s8x")
SOCKADDR_IN6: Final = struct.Struct("=HHI16sI")

PATIENCE_SECONDS: Final = 0.02
PATIENCE_SHARE: Final = 10
"""Limits of the wait for a full interface: seconds in a row, and one part in this many of the time. All other copies
wait with it."""
PAUSE_SECONDS: Final = 0.0005
"""Pause between tries at a full queue: no signal tells of room, and an unread error of raw IP ends poll(2)."""


class PacketSocket:
    """One raw socket, of AF_PACKET with PACKET_VNET_HDR or of raw IP, shared by the collectors behind one interface."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._takes_frames = sock.family == socket.AF_PACKET
        self.gso = GsoFallback(offered=self._takes_frames)
        if self._takes_frames:
            sock.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
        self._patience = PATIENCE_SECONDS
        self._patience_at = time.monotonic()

    def name(self, addressing: Addressing) -> bytes:
        """Return the socket address that messages to a collector carry."""
        if self._takes_frames:
            ethertype = ETHERTYPE_IPV4 if addressing.version == 4 else ETHERTYPE_IPV6
            protocol = socket.htons(ethertype)
            return SOCKADDR_LL.pack(socket.AF_PACKET, protocol, addressing.link_index, 0, 0, 6, addressing.ethernet[:6])
        if addressing.version == 4:
            return SOCKADDR_IN.pack(socket.AF_INET, 0, addressing.address)
        return SOCKADDR_IN6.pack(socket.AF_INET6, 0, 0, addressing.address, 0)

    def send(self, plan: FramePlan, destinations: Sequence[Destination]) -> int:
        """Send what is planned and addressed, each part to its destination; return the number of rows handled.

        These were delivered or dropped. Fewer than all means that runs were refused from there on: plan the rest again
        without segmentation.
        """
        at, skips, stop = 0, 0, plan.units
        forgiven = plan.frames if self._takes_frames else -1
        dropped: list[tuple[int, int, str]] = []
        while at < plan.frames:
            taken, error = send(self._socket.fileno(), plan.messages, at, plan.frames)
            at += taken
            if taken:
                continue
            if error in NO_ROOM:
                if self._wait():
                    continue
            elif forgiven < at:
                # With IP_RECVERR the next send ends with an ICMP error, to whatever packet: it says nothing of this
                # one. An error of this one will come again.
                forgiven = at
                continue
            unit = plan.unit_of(at)
            if plan.segmented(unit) and self.gso.refused_by(error):
                stop = unit
                break
            last, skips = unit + 1, skips + 1
            if error in RAW_CAUSES or skips > MAX_SKIPS:  # the next collector's may leave all the same
                last, skips = int(plan.first_units[plan.part_of(unit) + 1]), 0
            dropped.append((unit, last, cause_of(error, RAW_CAUSES)))
            if error not in NO_ROOM:
                destinations[plan.part_of(unit)].said.say(
                    "copies to a collector fail; check its host, its port and the route", error
                )
            at = plan.first_frame(last)
        accounts = [destination.held.account_of(templates=plan.templates) for destination in destinations]
        _account(plan, stop, dropped, accounts)
        return int(plan.rows_before[stop])

    def send_few(self, few: FewFrames, frames: list[Frame], account: Counter[str]) -> int:
        """Send frames to one collector; return how many have left. The rest is for `send`, which handles errors."""
        taken, _ = send(self._socket.fileno(), few.messages_at, 0, len(frames))
        whole = taken == len(frames)
        account[SENT] += few.rows if whole else sum([len(frame.rows) for frame in frames[:taken]])
        account[BYTES] += few.size if whole else sum([frame.size for frame in frames[:taken]])
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


def _account(
    plan: FramePlan, stop: int, dropped: Sequence[tuple[int, int, str]], accounts: Sequence[Counter[str]]
) -> None:
    """Count units before `stop` as delivered, except the ranges, each within one part, that were dropped."""
    bounds = np.minimum(plan.first_units, stop)
    rows, sizes = np.diff(plan.rows_before[bounds]).tolist(), np.diff(plan.bytes_before[bounds]).tolist()
    for first, last, cause in dropped:
        part = plan.part_of(first)
        lost = int(plan.rows_before[last] - plan.rows_before[first])
        accounts[part][cause] += lost
        rows[part] -= lost
        sizes[part] -= int(plan.bytes_before[last] - plan.bytes_before[first])
    for account, delivered, size in zip(accounts, rows, sizes, strict=True):
        account[SENT] += delivered
        account[BYTES] += size


class PacketSockets:
    """All raw sockets: each interface has one for its copies, its own as long as there are enough."""

    def __init__(
        self, packet: Sequence[socket.socket], ip4: Sequence[socket.socket], ip6: Sequence[socket.socket]
    ) -> None:
        frames = _SocketsOfKind(packet)
        self._pools = {
            (4, EgressKind.FRAMES): frames,
            (6, EgressKind.FRAMES): frames,
            (4, EgressKind.PACKETS): _SocketsOfKind(ip4),
            (6, EgressKind.PACKETS): _SocketsOfKind(ip6),
        }

    def have_one_for(self, egress: Egress, version: int) -> bool:
        """Return whether there is a socket for a way; a host without IPv6 has none for its packets."""
        return bool(self._pools[version, egress.kind].sockets)

    def for_egress(self, egress: Egress, version: int) -> PacketSocket:
        """Return the socket for a way."""
        return self._pools[version, egress.kind].for_link(egress.link.index if egress.link else 0)

    def refresh(self) -> None:
        """Try segmentation again. Due every second."""
        for pool in self._pools.values():
            for exit_ in pool.sockets:
                exit_.gso.try_again()


class _SocketsOfKind:
    """Sockets of one kind, given to interfaces at their first use; they are shared in turn when there are no more."""

    def __init__(self, sockets: Sequence[socket.socket]) -> None:
        self.sockets = [PacketSocket(sock) for sock in sockets]
        self._of_link: dict[int, PacketSocket] = {}

    def for_link(self, link_index: int) -> PacketSocket:
        if link_index not in self._of_link:
            self._of_link[link_index] = self.sockets[len(self._of_link) % len(self.sockets)]
        return self._of_link[link_index]
