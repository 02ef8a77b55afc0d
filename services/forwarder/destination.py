"""One collector's socket: connected, non-blocking, its own.

Datagrams that the kernel does not take are dropped and counted.
"""

import contextlib
import errno
import socket
import time
from collections import Counter
from typing import Final

from services.forwarder.few_rows import Few
from services.forwarder.mixed_rows import MixedRows
from services.forwarder.plan import SendPlan
from services.forwarder.socket_options import HEADERS, mark_headers, open_socket, path_mtu, source_of_new_socket
from shared.client import MOST_WAITING, Client
from shared.datagrams.mmsg import send
from shared.fanout.sending.backlog import Backlog, BacklogMemory
from shared.fanout.sending.gso_fallback import GsoFallback
from shared.fanout.sending.send_errors import MAX_SKIPS, NO_ROOM, RELAY_CAUSES, SaidErrors, cause_of
from shared.ledger.counters import (
    BUFFER_FULL,
    BYTES,
    NOT_CONNECTED,
    PROHIBITED,
    REFUSALS,
    REFUSED,
    SENT,
    UNREACHABLES,
    WITHHELD,
)
from shared.log import get_logger
from shared.net.queues import Queues
from shared.net.route_changes import RouteChanges
from shared.settings.tables import Forwarder

PROBE_SECONDS: Final = 1.0
ANSWER_SECONDS: Final = 0.5
"""A probe that was not refused for this long has arrived."""
UNANSWERED_SECONDS: Final = 3.5
"""A host that the kernel could not find is absent for this long: it asks three times, once a second (arp(7))."""
NO_DESCRIPTOR: Final = (errno.EMFILE, errno.ENFILE)
LINK_LOCAL_SOURCE: Final = "fe80:"
"""The only source for a second when an address was replaced; not to be used, since routers drop its datagrams."""

log = get_logger()


class Destination:
    """Sends copies to one collector; an error costs only that collector.

    `full` says that the last `send` ended because there was no room; `held` has the rows that wait for it.
    """

    def __init__(
        self,
        client: Client,
        settings: Forwarder,
        account: Counter[str],
        memory: BacklogMemory,
        changes: RouteChanges,
        queues: Queues,
    ) -> None:
        self.client = client
        self.account = account
        self.full = False
        most = MOST_WAITING["relay"]
        self.held = Backlog(account, BUFFER_FULL, settings.queue_seconds, most, settings.queue_bytes, memory)
        self._settings = settings
        self._changes = changes
        self._changes_seen = -1
        self._queues = queues
        self._takes_runs = True
        self._socket: socket.socket | None = None
        self._gso = GsoFallback(offered=settings.segmentation)
        self._path_segment = 0
        self._said = SaidErrors(client.name)
        self._withholding = False
        self._probed_at: float | None = None
        self._probe_at = 0.0
        self._unanswered_until = 0.0
        self.refresh()

    @property
    def unreachable(self) -> bool:
        """Return whether there is no route, no such family here, or no host that answers for the address."""
        return self._socket is None or time.monotonic() < self._unanswered_until

    @property
    def largest_segment(self) -> int:
        """Length up to which datagrams leave together by UDP_SEGMENT; 0: none leave together."""
        return self._path_segment if self._gso.usable and self._takes_runs else 0

    def adopt(self, client: Client) -> None:
        """Serve another entry of the same address and port from now on, with its hop limit and DSCP."""
        self.client = client
        if self._socket is not None:
            mark_headers(self._socket, client)
            with contextlib.suppress(OSError):  # no way now: the next look shows it
                self._socket.connect(self._socket.getpeername())  # with a new DSCP the kernel has forgotten the route

    def refresh(self) -> None:
        """Connect if not connected, or if the source has changed; read ICMP errors, and what the path takes."""
        changed, self._changes_seen = self._changes_seen != self._changes.version, self._changes.version
        if changed:
            self._takes_runs = self._queues.take_runs_to(self.client.address, self._changes.version)
        if self._socket is None:
            self._socket = self._open()
        elif not (changed and self._reconnect_if_moved()):
            # a collector with little traffic would otherwise learn of it only with its next datagram
            self._note(self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))
        if self._probed_at is not None and time.monotonic() >= self._probed_at + ANSWER_SECONDS:
            self._withholding, self._probed_at = False, None
        self._gso.try_again()
        if self._socket is not None:
            try:
                self._path_segment = path_mtu(self._socket) - HEADERS[self._socket.family]
            except OSError:  # its route is gone
                self._disconnect()

    def read_errors(self) -> None:
        """Note an ICMP error that has come since the last datagram was sent."""
        if self._socket is not None:
            self._note(self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))

    def seek(self) -> None:
        """Connect if that is possible now, and read what was answered."""
        self.refresh()

    def _open(self) -> socket.socket | None:
        try:
            return open_socket(self.client, self._settings.send_buffer)
        except OSError as error:
            self._said.say(f"{_why_not_open(error.errno or 0)}; the forwarder keeps trying", error.errno or 0)
            return None

    def _reconnect_if_moved(self) -> bool:
        """Replace the socket if a new one would send from another address; return whether that is so.

        The source of a connected socket is chosen once: it would outlive its address, or a better route elsewhere.
        """
        try:
            source = source_of_new_socket(self.client)
        except OSError:  # no way now: the next send will show it
            return False
        if self._socket is None or source == self._socket.getsockname()[0] or source.startswith(LINK_LOCAL_SOURCE):
            return False
        if not (fresh := self._open()):
            return False
        log.info(
            "copies have another source address now: this host's addresses or routes have changed",
            collector=self.client.name,
            address=source,
        )
        self._socket.close()  # datagrams already sent belong to the network: they leave before those of the new socket
        self._socket = fresh
        return True

    def send(self, plan: SendPlan, part: int = 0) -> int:
        """Send a part of the plan; return the number of its rows that were delivered or dropped.

        Fewer than all means that there is no room for the rest, if it is `full` now. Otherwise segments were refused
        from there on: plan the rest again, with the present `largest_segment`.
        """
        self.full = False
        first, stop = plan.sends_of(part)
        if self._withholding and first < stop:
            self._withhold(plan, first, stop)
            return plan.rows_of(part)
        return int(plan.rows_before[self._send(plan, first, stop)] - plan.rows_before[first])

    def send_few(self, few: Few | MixedRows) -> int:
        """Send datagrams; return the number of sends that have left. The rest is for `send`, which handles errors.

        An error that may be the answer to an earlier datagram is noted here, since the kernel tells it once.
        """
        if self._withholding or self._socket is None:
            return 0
        sent, error = few.send(self._socket)
        if error in RELAY_CAUSES:
            self._note(error)
        account = self.held.account_of(templates=few.templates)
        account[SENT] += sum(few.rows[:sent])
        account[BYTES] += sum(few.sizes[:sent])
        return sent

    def _send(self, plan: SendPlan, at: int, stop: int) -> int:
        """Send or drop sends `at` to `stop`; return the number of the first that was neither, else `stop`."""
        if self._socket is None:
            self._drop(plan, at, stop, NOT_CONNECTED)
            return stop
        skips, forgiven, probing = 0, -1, False
        while at < stop:
            taken, error = send(self._socket.fileno(), plan.headers, at, at + 1 if probing else stop)
            self._deliver(plan, at, at + taken)
            at += taken
            if taken:
                # When fewer were taken than possible, sendmmsg(2) hides the reason: send one and ask.
                told = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) if probing else 0
                probing = not probing
                if told in RELAY_CAUSES:
                    return self._stop(plan, at, stop, told)
                self._note(told)
            elif error in NO_ROOM:
                self.full = True
                return at
            elif forgiven < 0 or (forgiven < at and error not in RELAY_CAUSES):
                # Perhaps the answer to an earlier datagram: a collector that has just come back still gets it.
                self._note(error)
                forgiven, probing = at, True
            elif self._reconnect_if_moved():
                forgiven = at
            elif plan.segmented(at) and self._gso.refused_by(error):
                # until `refresh`: the path's MTU may have shrunk, or its device can't do it at all
                self._said.say("UDP_SEGMENT is refused: copies to a collector leave one by one, which is slower", error)
                return at
            elif error in RELAY_CAUSES or skips == MAX_SKIPS:
                return self._stop(plan, at, stop, error)
            else:
                self._drop(plan, at, at + 1, cause_of(error, RELAY_CAUSES))
                at, skips = at + 1, skips + 1
        return stop

    def _stop(self, plan: SendPlan, at: int, stop: int, error: int) -> int:
        """Drop the rest under the cause of an error."""
        self._note(error)
        cause = cause_of(error, RELAY_CAUSES)
        self._drop(plan, at, stop, cause)
        if cause == NOT_CONNECTED and not self._has_way():
            self._disconnect()
        return stop

    def _has_way(self) -> bool:
        """Return whether this host knows a way, so that a router or the collector's host has refused."""
        try:
            return bool(source_of_new_socket(self.client))
        except OSError as error:  # no descriptor left, say: then it is not known
            return error.errno != errno.EINVAL and RELAY_CAUSES.get(error.errno or 0) != NOT_CONNECTED

    def _note(self, error: int) -> None:
        """Note an ICMP error, whichever datagram it answers; a lack of room here is none of the collector's."""
        if error and error not in NO_ROOM:
            self._said.say("copies to a collector fail; check its host, its port and the route", error)
        cause = RELAY_CAUSES.get(error)
        if cause == REFUSED:
            self.account[REFUSALS] += 1
            self._withholding, self._probed_at = self._settings.withhold, None
        elif cause == NOT_CONNECTED:
            self.account[UNREACHABLES] += 1
            self.account[PROHIBITED] += error == errno.EACCES
            self._unanswered_until = time.monotonic() + UNANSWERED_SECONDS

    def _withhold(self, plan: SendPlan, at: int, stop: int) -> None:
        """Send one datagram, unless the fate of the last one is still unknown; keep back the rest."""
        rows, account = int(plan.rows_before[stop] - plan.rows_before[at]), self._account_of(plan)
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
                account[SENT] += 1
                account[BYTES] += len(payload)
                rows -= 1
        account[WITHHELD] += rows

    def _account_of(self, plan: SendPlan) -> Counter[str]:
        return self.held.account_of(templates=plan.templates)

    def _deliver(self, plan: SendPlan, start: int, stop: int) -> None:
        account = self._account_of(plan)
        account[SENT] += int(plan.rows_before[stop] - plan.rows_before[start])
        account[BYTES] += int(plan.bytes_before[stop] - plan.bytes_before[start])

    def _drop(self, plan: SendPlan, start: int, stop: int, cause: str) -> None:
        self._account_of(plan)[cause] += int(plan.rows_before[stop] - plan.rows_before[start])

    def _disconnect(self) -> None:
        """Close the socket; `refresh` opens another."""
        self.held.drop(NOT_CONNECTED)
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        self._withholding, self._probed_at = False, None

    def close(self) -> None:
        """Close the socket, and drop waiting rows."""
        self.held.drop()
        self._disconnect()


def _why_not_open(error: int) -> str:
    if error in NO_DESCRIPTOR:
        return "no descriptor left for a collector's socket: raise LimitNOFILE= of the unit, or ulimit -Hn"
    if RELAY_CAUSES.get(error) == NOT_CONNECTED:
        return "there is no route to a collector"
    return "a collector's socket can't be made"
