"""One collector's socket: connected, non-blocking, its own. What the kernel does not take is dropped and counted."""

import errno
import socket
from collections import Counter
from typing import Final

import structlog

from services.forwarder.plan import SendPlan
from shared.ledger import BUFFER_FULL, BYTES, DELIVERED, DROPPED, NOT_CONNECTED, REFUSALS, REFUSED
from shared.mmsg import send
from shared.registry import Client
from shared.settings import Forwarder

IP_MTU: Final = 14
IPV6_MTU: Final = 24
SO_SNDBUFFORCE: Final = 32
IPV4_HEADERS: Final = 28
IPV6_HEADERS: Final = 48
NO_SEGMENTATION: Final = (errno.EIO, errno.EINVAL, errno.EMSGSIZE, errno.EOPNOTSUPP)
"""What a kernel or a route that can't cut a UDP_SEGMENT send says to one (linux/net/ipv4/udp.c, udp_send_skb)."""
STOPS: Final = {
    errno.EAGAIN: BUFFER_FULL,
    errno.ENOBUFS: BUFFER_FULL,
    errno.ECONNREFUSED: REFUSED,
    **dict.fromkeys((errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.EADDRNOTAVAIL), NOT_CONNECTED),
}
"""Errors that the next datagram would meet too: the rest of the batch is dropped under this cause."""
MAX_SKIPS: Final = 16
"""Datagrams of a batch that may fail one by one before the rest is dropped with them."""

log = structlog.get_logger()


class Outlet:
    """Sends copies to one collector; an error costs that collector, nobody else."""

    def __init__(self, client: Client, settings: Forwarder, account: Counter[str]) -> None:
        self.client = client
        self.account = account
        self.largest_segment = 0
        self._settings = settings
        self._socket: socket.socket | None = None
        self._said_no_segmentation = False
        self.refresh()

    def refresh(self) -> None:
        """Connect if not connected, and learn the path's MTU, which bounds segments. Due every second."""
        if self._socket is None:
            self._socket = self._open()
        if self._socket is None or not self._settings.segmentation:
            return
        version_4 = self._socket.family == socket.AF_INET
        level, option = (socket.IPPROTO_IP, IP_MTU) if version_4 else (socket.IPPROTO_IPV6, IPV6_MTU)
        try:
            mtu = self._socket.getsockopt(level, option)
        except OSError:  # its route is gone
            self.close()
            return
        self.largest_segment = mtu - (IPV4_HEADERS if version_4 else IPV6_HEADERS)

    def _open(self) -> socket.socket | None:
        family = socket.AF_INET6 if ":" in self.client.address else socket.AF_INET
        sock = None
        try:
            sock = socket.socket(family, socket.SOCK_DGRAM)
            sock.setblocking(False)
            self._enlarge_send_buffer(sock)
            sock.connect((self.client.address, self.client.port))
        except OSError:
            if sock is not None:
                sock.close()
            return None
        return sock

    def _enlarge_send_buffer(self, sock: socket.socket) -> None:
        try:
            sock.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, self._settings.send_buffer)
        except PermissionError:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self._settings.send_buffer)

    def send(self, plan: SendPlan) -> int:
        """Send what is planned; return how many rows were dealt with, delivered or dropped.

        Fewer than all means that segments were refused from there on: plan the rest again, with `largest_segment` as
        it is now.
        """
        if self._socket is None:
            self._drop(plan, 0, plan.sends, NOT_CONNECTED)
            return plan.rows
        at, allowed_refusals, allowed_skips = 0, 1, MAX_SKIPS
        while at < plan.sends:
            taken, error = send(self._socket.fileno(), plan.headers, at, plan.sends)
            self._deliver(plan, at, at + taken)
            at += taken
            if not error:
                continue
            if error == errno.ECONNREFUSED:
                # The answer to an earlier datagram, told to this one, which was not sent. One is forgiven: a
                # collector that has just come back still hears of it.
                self.account[REFUSALS] += 1
                allowed_refusals -= 1
                if allowed_refusals >= 0:
                    continue
            elif error in NO_SEGMENTATION and plan.segmented(at):
                self._give_up_segmentation(error)
                return int(plan.rows_before[at])
            if error in STOPS or not allowed_skips:
                self._drop(plan, at, plan.sends, STOPS.get(error) or _cause(error))
                if STOPS.get(error) == NOT_CONNECTED:
                    self.close()
                break
            self._drop(plan, at, at + 1, _cause(error))
            at, allowed_skips = at + 1, allowed_skips - 1
        return plan.rows

    def _deliver(self, plan: SendPlan, start: int, stop: int) -> None:
        self.account[DELIVERED] += int(plan.rows_before[stop] - plan.rows_before[start])
        self.account[BYTES] += int(plan.bytes_before[stop] - plan.bytes_before[start])

    def _drop(self, plan: SendPlan, start: int, stop: int, cause: str) -> None:
        self.account[cause] += int(plan.rows_before[stop] - plan.rows_before[start])

    def _give_up_segmentation(self, error: int) -> None:
        """Send one by one until `refresh`: the path's MTU may have shrunk, or its device can't do it at all."""
        self.largest_segment = 0
        if not self._said_no_segmentation:
            self._said_no_segmentation = True
            log.warning("UDP_SEGMENT refused, sending one by one", collector=self.client.name, error=_cause(error))

    def close(self) -> None:
        """Close the socket; `refresh` opens another."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def _cause(error: int) -> str:
    return DROPPED + errno.errorcode.get(error, str(error)).lower()
