"""One collector's socket: connected, non-blocking, its own. What the kernel does not take is dropped and counted."""

import errno
import os
import socket
import time
from collections import Counter
from typing import Final

import structlog

from services.forwarder.few import Few
from services.forwarder.plan import SendPlan
from shared.client import Client
from shared.datagrams.mmsg import send
from shared.fanout.backlog import Backlog, BacklogMemory
from shared.ledger import (
    BUFFER_FULL,
    BYTES,
    DELIVERED,
    DROPPED,
    NOT_CONNECTED,
    REFUSALS,
    REFUSED,
    UNREACHABLES,
    WITHHELD,
)
from shared.net.sockets import enlarge_send_buffer
from shared.settings.model import Forwarder

IP_MTU: Final = 14
IPV6_MTU: Final = 24
IPV4_HEADERS: Final = 28
IPV6_HEADERS: Final = 48
HEADER_OPTIONS: Final = {
    socket.AF_INET: ((socket.IPPROTO_IP, socket.IP_TTL), (socket.IPPROTO_IP, socket.IP_TOS)),
    socket.AF_INET6: (
        (socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS),
        (socket.IPPROTO_IPV6, socket.IPV6_TCLASS),
    ),
}
"""What sets hop limit, and DSCP with the two bits below it that are not ours."""
RECVERR: Final = {socket.AF_INET: (socket.IPPROTO_IP, 11), socket.AF_INET6: (socket.IPPROTO_IPV6, 25)}
"""IP_RECVERR, IPV6_RECVERR: without it the kernel hides that an interface's queue was full, or that no host answers."""
NO_SEGMENTATION: Final = (errno.EIO, errno.EINVAL, errno.EMSGSIZE, errno.EOPNOTSUPP)
"""What a kernel or a route that can't cut a UDP_SEGMENT send says to one (linux/net/ipv4/udp.c, udp_send_skb)."""
FULL: Final = (errno.EAGAIN, errno.ENOBUFS)
"""There is no room just now: in the socket's buffer, or in the interface's queue."""
STOPS: Final = {
    errno.ECONNREFUSED: REFUSED,
    **dict.fromkeys((errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.EADDRNOTAVAIL), NOT_CONNECTED),
}
"""Errors that the next datagram would meet too: the rest of the batch is dropped under this cause."""
MAX_SKIPS: Final = 16
"""Datagrams of a batch that may fail one by one before the rest is dropped with them."""

HELD_ROWS: Final = 65_536
"""How many datagrams one collector may have waiting, however small."""
PROBE_SECONDS: Final = 1.0
ANSWER_SECONDS: Final = 0.5
"""A probe that was not refused for so long has arrived."""
UNANSWERED_SECONDS: Final = 3.5
"""A host that the kernel could not find is not there for so long: it asks three times, once a second (arp(7))."""

log = structlog.get_logger()


class Outlet:
    """Sends copies to one collector; an error costs that collector, nobody else.

    `full` says that the last `send` ended because there was no room; in `held` is what waits for it.
    """

    def __init__(self, client: Client, settings: Forwarder, account: Counter[str], memory: BacklogMemory) -> None:
        self.client = client
        self.account = account
        self.largest_segment = 0
        self.full = False
        self.held = Backlog(account, BUFFER_FULL, settings.queue_seconds, HELD_ROWS, settings.queue_bytes, memory)
        self._settings = settings
        self._socket: socket.socket | None = None
        self._said: set[str] = set()
        self._withholding = False
        self._probed_at: float | None = None
        self._probe_at = 0.0
        self._unanswered_until = 0.0
        self.refresh()

    @property
    def unreachable(self) -> bool:
        """Whether there is no route, no such family here, or nobody who answers for the address."""
        return self._socket is None or time.monotonic() < self._unanswered_until

    def refresh(self) -> None:
        """Connect if not connected; learn of ICMP errors, and of the path's MTU, which bounds segments."""
        if self._socket is None:
            self._socket = self._open()
        else:  # who is sent little would else hear of it with the next datagram, whenever that is
            self._note(self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))
        if self._probed_at is not None and time.monotonic() >= self._probed_at + ANSWER_SECONDS:
            self._withholding, self._probed_at = False, None
        if self._socket is None or not self._settings.segmentation:
            return
        version_4 = self._socket.family == socket.AF_INET
        level, option = (socket.IPPROTO_IP, IP_MTU) if version_4 else (socket.IPPROTO_IPV6, IPV6_MTU)
        try:
            mtu = self._socket.getsockopt(level, option)
        except OSError:  # its route is gone
            self._disconnect()
            return
        self.largest_segment = mtu - (IPV4_HEADERS if version_4 else IPV6_HEADERS)

    def _open(self) -> socket.socket | None:
        family = socket.AF_INET6 if ":" in self.client.address else socket.AF_INET
        sock = None
        try:
            sock = socket.socket(family, socket.SOCK_DGRAM)
            sock.setblocking(False)
            enlarge_send_buffer(sock, self._settings.send_buffer)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 0)  # nobody reads: neither answers nor errors pile up
            sock.setsockopt(*RECVERR[family], 1)
            for option, value in zip(
                HEADER_OPTIONS[family], (self.client.hop_limit, self.client.dscp << 2), strict=True
            ):
                sock.setsockopt(*option, value)
            sock.connect((self.client.address, self.client.port))
        except OSError as error:
            if sock is not None:
                sock.close()
            self._say_once("no way to a collector; trying again all the time", error.errno or 0)
            return None
        return sock

    def send(self, plan: SendPlan, part: int = 0) -> int:
        """Send a part of what is planned; return how many rows of it were dealt with, delivered or dropped.

        Fewer than all means that there is no room for the rest, if it is `full` now; else that segments were refused
        from there on: plan the rest again, with `largest_segment` as it is now.
        """
        self.full = False
        first, stop = plan.sends_of(part)
        if self._withholding and first < stop:
            self._withhold(plan, first, stop)
            return plan.rows_of(part)
        return int(plan.rows_before[self._send(plan, first, stop)] - plan.rows_before[first])

    def send_few(self, few: Few) -> int:
        """Send datagrams; return how many have left. The rest is for `send`, which handles errors.

        An error that may be the answer to an earlier datagram is noted here, since the kernel tells it once.
        """
        if self._withholding or self._socket is None:
            return 0
        sent = 0
        try:
            for buffers in few.sends:
                self._socket.sendmsg(buffers, few.controls)
                sent += 1
        except OSError as error:
            if error.errno in STOPS:
                self._note(error.errno)
        rows = sum(few.rows[:sent])
        self.account[DELIVERED] += rows
        self.account[BYTES] += sum(few.sizes[:sent])
        return rows

    def _send(self, plan: SendPlan, at: int, stop: int) -> int:
        """Send or drop sends `at` to `stop`; return the number of the first that was neither, else `stop`."""
        if self._socket is None:
            self._drop(plan, at, stop, NOT_CONNECTED)
            return stop
        skips, forgiven, probing = 0, False, False
        while at < stop:
            taken, error = send(self._socket.fileno(), plan.headers, at, at + 1 if probing else stop)
            self._deliver(plan, at, at + taken)
            at += taken
            if taken:
                # When fewer were taken than could be, sendmmsg(2) keeps the reason to itself: send one and ask.
                told = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) if probing else 0
                probing = not probing
                if told:
                    return self._stop(plan, at, stop, told)
            elif error in FULL:
                self.full = True
                return at
            elif error in STOPS and not forgiven:
                # Perhaps the answer to an earlier datagram: a collector that has just come back still hears of it.
                self._note(error)
                forgiven = probing = True
            elif error in NO_SEGMENTATION and plan.segmented(at):
                self._give_up_segmentation(error)
                return at
            elif error in STOPS or skips == MAX_SKIPS:
                return self._stop(plan, at, stop, error)
            else:
                self._drop(plan, at, at + 1, _cause(error))
                at, skips = at + 1, skips + 1
        return stop

    def _stop(self, plan: SendPlan, at: int, stop: int, error: int) -> int:
        """Drop what is left under the cause that an error stands for."""
        self._note(error)
        cause = BUFFER_FULL if error in FULL else STOPS.get(error) or _cause(error)
        self._drop(plan, at, stop, cause)
        if cause == NOT_CONNECTED:
            self._disconnect()
        return stop

    def _note(self, error: int) -> None:
        """Take note of what an ICMP error says, whichever datagram it is the answer to."""
        if error == errno.ECONNREFUSED:
            self.account[REFUSALS] += 1
            self._withholding, self._probed_at = self._settings.withhold, None
        elif error in STOPS:
            self.account[UNREACHABLES] += 1
            self._unanswered_until = time.monotonic() + UNANSWERED_SECONDS

    def _withhold(self, plan: SendPlan, at: int, stop: int) -> None:
        """Send one datagram, unless it is not known yet what became of the last one; keep back the rest."""
        rows = int(plan.rows_before[stop] - plan.rows_before[at])
        now = time.monotonic()
        if self._probed_at is None and now >= self._probe_at and self._socket is not None:
            payload = plan.first_datagram(at)
            try:
                self._socket.send(payload)
            except ConnectionRefusedError:  # the answer to an earlier one
                self._note(errno.ECONNREFUSED)
            except OSError as error:
                self._stop(plan, at, stop, error.errno or 0)
                return
            else:
                self._probed_at, self._probe_at = now, now + PROBE_SECONDS
                self.account[DELIVERED] += 1
                self.account[BYTES] += len(payload)
                rows -= 1
        self.account[WITHHELD] += rows

    def _deliver(self, plan: SendPlan, start: int, stop: int) -> None:
        self.account[DELIVERED] += int(plan.rows_before[stop] - plan.rows_before[start])
        self.account[BYTES] += int(plan.bytes_before[stop] - plan.bytes_before[start])

    def _drop(self, plan: SendPlan, start: int, stop: int, cause: str) -> None:
        self.account[cause] += int(plan.rows_before[stop] - plan.rows_before[start])

    def _give_up_segmentation(self, error: int) -> None:
        """Send one by one until `refresh`: the path's MTU may have shrunk, or its device can't do it at all."""
        self.largest_segment = 0
        self._say_once("UDP_SEGMENT refused, sending one by one", error)

    def _say_once(self, event: str, error: int) -> None:
        if event not in self._said:
            self._said.add(event)
            log.warning(event, collector=self.client.name, error=os.strerror(error))

    def _disconnect(self) -> None:
        """Close the socket; `refresh` opens another."""
        self.held.drop(NOT_CONNECTED)
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        self._withholding, self._probed_at = False, None

    def close(self) -> None:
        """Close the socket, and drop what waits."""
        self.held.drop()
        self._disconnect()


def _cause(error: int) -> str:
    return DROPPED + errno.errorcode.get(error, str(error)).lower()
