"""Queues of interfaces (tc(8), qdisc), as rtnetlink(7) tells of them: which take no runs, and what they have dropped.

A run is several datagrams in one packet that kernel or device cuts up later. Some queues cut a run themselves, keep
what fits, and report success for all of it. Others never have room for a whole run. To both datagrams go one by one:
then the kernel tells of each that it does not take. No privilege is needed.
"""

import socket
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, NamedTuple

from shared.net.netlink_format import (
    ATTRIBUTE,
    ENDS,
    KERNEL,
    NLM_F_DUMP,
    RECEIVE_SIZE,
    attributes,
    messages,
    request,
)

LARGEST_RUN: Final = 70_000
"""Bytes of the largest run as a queue counts it, with the headers of each datagram."""
TICK: Final = 64e-9
"""Seconds of a PSCHED tick (linux/include/net/pkt_sched.h, PSCHED_SHIFT)."""
ANSWER_SECONDS: Final = 2.0
RTM_GETLINK: Final = 18
RTM_GETROUTE: Final = 26
RTM_GETQDISC: Final = 38
TCMSG: Final = struct.Struct("=B3xiIII")
"""struct tcmsg: family, link, handle, parent, info."""
IFINFOMSG: Final = struct.Struct("=BxHiII")
"""struct ifinfomsg: family, type, link, flags, change."""
RTMSG: Final = struct.Struct("=8BI")
"""struct rtmsg: family, lengths of destination and source in bits, and fields that are zero in a question."""
TCA_KIND, TCA_OPTIONS, TCA_STATS2, TCA_STATS_QUEUE = 1, 2, 7, 3
IFLA_LINKINFO, IFLA_INFO_KIND, IFLA_STATS64 = 18, 1, 23
TC_H_ROOT: Final = 0xFFFFFFFF
TX_DROPPED: Final = struct.Struct("=56xQ")
"""struct rtnl_link_stats64 (linux/if_link.h): seven other counters first."""
RTA_DST, RTA_OIF = 1, 4
TCA_TBF_PARMS, TCA_TBF_RATE64 = 1, 4
TBF: Final = struct.Struct("=8xI8xIIII")
"""struct tc_tbf_qopt: rate and peak rate in bytes a second, limit in bytes, burst and its peak in ticks."""
DROPS: Final = struct.Struct("=8xI")
"""struct gnet_stats_queue: queue length, backlog, drops."""
NUMBER: Final = struct.Struct("=I")
RATE64: Final = struct.Struct("=Q")
SINGLE: Final = ("", "veth")
"""Kinds of links that have no other one below."""


@dataclass(frozen=True, slots=True)
class Queue:
    """A queue of a link: its kind, as in `tbf`, the packets that it has dropped, and whether it takes runs."""

    link_index: int
    kind: str
    dropped: int
    takes_runs: bool


class Drops(NamedTuple):
    """Packets that were dropped on their way out: by the queues of a link, and by the link itself."""

    queue: int
    link: int


class Queues:
    """The queues of this host's links. Its socket is opened at once.

    Each new `version` of the routes has it ask anew which of them take runs. Where netlink is not allowed, every queue
    is thought to take runs.
    """

    def __init__(self) -> None:
        self._questions = _open()
        self._sequence = 0
        self._version = -1
        self._without_runs: set[int] = set()

    def take_runs_to(self, address: str, version: int) -> bool:
        """Return whether the way to an address takes runs."""
        self._renew(version)
        return not self._without_runs or self._link_to(address) not in self._without_runs

    def take_runs_by(self, link_index: int, version: int) -> bool:
        """Return whether a link takes runs."""
        self._renew(version)
        return link_index not in self._without_runs

    def _renew(self, version: int) -> None:
        if version == self._version:
            return
        self._version = version
        self._without_runs = {queue.link_index for queue in self.all() if not queue.takes_runs}
        if self._without_runs:  # a tunnel, a bond or a VLAN may have its queue further down, at such a link
            self._without_runs |= self._stacked_links()

    def all(self) -> list[Queue]:
        """Return every queue of every link. One in an unknown format is left out."""
        found = []
        for body in self._ask(RTM_GETQDISC, TCMSG.pack(0, 0, 0, 0, 0)):
            with suppress(LookupError, ValueError, struct.error):
                found.append(_queue(body))
        return found

    def dropped(self) -> dict[int, Drops]:
        """Return, by link, the packets that its queues and the link itself have dropped on their way out, ever.

        The queue at the root of a link also counts what those within it drop.
        """
        queues, links = {}, {}
        for body in self._ask(RTM_GETQDISC, TCMSG.pack(0, 0, 0, 0, 0)):
            with suppress(LookupError, ValueError, struct.error):
                if TCMSG.unpack_from(body)[3] == TC_H_ROOT:
                    queue = _queue(body)
                    queues[queue.link_index] = queue.dropped
        for body in self._ask(RTM_GETLINK, IFINFOMSG.pack(0, 0, 0, 0, 0)):
            with suppress(LookupError, ValueError, struct.error):
                counted = attributes(body[IFINFOMSG.size :])[IFLA_STATS64]
                links[IFINFOMSG.unpack_from(body)[2]] = TX_DROPPED.unpack_from(counted)[0]
        return {index: Drops(queues.get(index, 0), dropped) for index, dropped in links.items()}

    def _stacked_links(self) -> set[int]:
        """Return the links that may have others below."""
        found = set()
        for body in self._ask(RTM_GETLINK, IFINFOMSG.pack(0, 0, 0, 0, 0)):
            info = attributes(attributes(body[IFINFOMSG.size :]).get(IFLA_LINKINFO, b""))
            if info.get(IFLA_INFO_KIND, b"").rstrip(b"\0").decode() not in SINGLE:
                found.add(IFINFOMSG.unpack_from(body)[2])
        return found

    def _link_to(self, address: str) -> int | None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        packed = socket.inet_pton(family, address)
        question = RTMSG.pack(family, 8 * len(packed), 0, 0, 0, 0, 0, 0, 0) + ATTRIBUTE.pack(4 + len(packed), RTA_DST)
        for body in self._ask(RTM_GETROUTE, question + packed, flags=0):
            if by := attributes(body[RTMSG.size :]).get(RTA_OIF):
                return int(*NUMBER.unpack(by))
        return None

    def _ask(self, kind: int, question: bytes, flags: int = NLM_F_DUMP) -> list[bytes]:
        """Return the bodies of the kernel's answers; none where it refuses, or does not answer."""
        if self._questions is None:
            return []
        self._sequence += 1
        try:
            self._questions.sendto(request(kind, flags, self._sequence, question), KERNEL)
            return list(self._answers(self._questions, several=bool(flags)))
        except OSError:
            return []

    def _answers(self, questions: socket.socket, *, several: bool) -> Iterator[bytes]:
        while True:
            for kind, sequence, body in messages(questions.recv(RECEIVE_SIZE)):
                if sequence == self._sequence:  # else it answers a question that was given up
                    if kind in ENDS:
                        return
                    yield body
                    if not several:
                        return

    def close(self) -> None:
        """Close the socket."""
        if self._questions is not None:
            self._questions.close()


def _open() -> socket.socket | None:
    try:
        questions = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, socket.NETLINK_ROUTE)
    except OSError:
        return None
    questions.settimeout(ANSWER_SECONDS)
    return questions


def _queue(body: bytes) -> Queue:
    _, link_index, *_ = TCMSG.unpack_from(body)
    found = attributes(body[TCMSG.size :])
    kind = found[TCA_KIND].rstrip(b"\0").decode()
    counted = attributes(found.get(TCA_STATS2, b"")).get(TCA_STATS_QUEUE, bytes(DROPS.size))
    most = LARGEST_OF.get(kind)
    takes_runs = most is None or most(found.get(TCA_OPTIONS, b"")) >= LARGEST_RUN
    (dropped,) = DROPS.unpack_from(counted)
    return Queue(link_index, kind, dropped, takes_runs)


def _largest_of_tbf(options: bytes) -> float:
    """Return the bytes of the largest packet that a token bucket neither cuts nor refuses (net/sched/sch_tbf.c)."""
    found = attributes(options)
    rate, peak, limit, burst, _ = TBF.unpack_from(found[TCA_TBF_PARMS])
    (rate,) = RATE64.unpack(found[TCA_TBF_RATE64]) if TCA_TBF_RATE64 in found else (rate,)
    return 0.0 if peak else min(limit, burst * TICK * rate)  # with a peak rate it takes little more than one packet


LARGEST_OF: Final[Mapping[str, Callable[[bytes], float]]] = {
    "tbf": _largest_of_tbf,
    "bfifo": lambda options: float(*NUMBER.unpack_from(options)),
}
"""By kind: the largest packet that a queue takes whole, in bytes. Those of other kinds count packets, not bytes."""
