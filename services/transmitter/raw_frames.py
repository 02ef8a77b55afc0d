"""Raw frames that a client asked for: checked against the policy, paced, sent byte for byte, and answered."""

import errno
import math
import os
import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from services.transmitter.policy import Audit, Policy, Refusal
from shared.bus.frame_requests import ANSWER_SECONDS, MAX_SENDING_SECONDS, parse_tags, sending_seconds
from shared.bus.messages import TransmitReply, TransmitRequest
from shared.fanout.sending.next_hops import NextHops
from shared.fanout.sending.send_errors import NO_INTERFACE
from shared.net.netlink import Link

SO_NOFCS: Final = 43
"""The frame brings its own check sequence (socket(7)); the driver must be able to leave its own out."""
ETHERNET_HEADER: Final = 14
VLAN_TAG: Final = 4
VLAN: Final = 0x8100
FCS_SIZE: Final = 4
MAX_JOBS: Final = 64
"""Requests under way at once."""
OVERTIME_SECONDS: Final = ANSWER_SECONDS / 2
"""Time that a request may take on top of its pace: the client still learns how far it came, then gives up."""
FRAMES_AT_ONCE: Final = 128
"""Frames of all requests sent before copies get their turn."""
RETRY_SECONDS: Final = 0.002
SENT: Final = "frames_sent"
FAILED: Final = "frames_failed"
REFUSED: Final = "frames_refused"

Answer = Callable[[str, TransmitReply], object]


class FrameError(Exception):
    """The fault of a frame: a word of the JSON protocol and a sentence; `cause` if the policy refuses the frame."""

    def __init__(self, word: str, message: str, cause: str = "") -> None:
        super().__init__(message)
        self.word = word
        self.cause = cause


@dataclass(slots=True)
class _Job:
    request: TransmitRequest
    due_at: float
    ends_at: float
    sent: int = 0


class RawFrames:
    """The requests under way.

    The first of the two sockets sends frames as they are, the second those that end with their own check sequence.
    """

    def __init__(
        self,
        sockets: Sequence[socket.socket],
        next_hops: NextHops,
        policy: Policy,
        audit: Audit,
        answer: Answer,
    ) -> None:
        self.counters: Counter[str] = Counter()
        self._sockets = sockets
        for own_fcs, sock in enumerate(sockets):
            sock.setsockopt(socket.SOL_SOCKET, SO_NOFCS, own_fcs)
        self._next_hops = next_hops
        self._policy = policy
        self._audit = audit
        self._answer = answer
        self._jobs: deque[_Job] = deque()

    def accept_request(self, request: TransmitRequest) -> None:
        """Begin a request, or answer with the reason against it."""
        try:
            if len(self._jobs) >= MAX_JOBS:
                raise FrameError("unavailable", f"{MAX_JOBS} requests are under way; try again")
            seconds = sending_seconds(request.count, request.per_second)
            if seconds > MAX_SENDING_SECONDS:
                message = f"the frames take {seconds:.0f} s at that pace; expected at most {MAX_SENDING_SECONDS:.0f} s"
                raise FrameError("bad_request", message)
            self._check(request)
        except FrameError as error:
            self._refuse(request, error)
        else:
            now = time.monotonic()
            self._jobs.append(_Job(request, now, now + seconds + OVERTIME_SECONDS))

    def work(self) -> float:
        """Send frames that are due; return the seconds until there are more, infinity when there are none."""
        now = time.monotonic()
        due = sum(job.due_at <= now for job in self._jobs)
        for _ in range(len(self._jobs)):
            job = self._jobs.popleft()
            try:
                if job.due_at <= now:
                    self._advance(job, now, FRAMES_AT_ONCE // due)
            except FrameError as error:
                self._refuse(job.request, error, job.sent)
                continue
            if job.sent == job.request.count:
                self._answer(job.request.reply, TransmitReply(job.request.id, job.sent))
            elif time.monotonic() < job.ends_at:
                self._jobs.append(job)
            else:
                message = f"{job.request.interface} or [transmitter] frames_per_second did not let them leave in time"
                self._refuse(job.request, FrameError("unavailable", message), job.sent)
        return max(0.0, min((job.due_at for job in self._jobs), default=math.inf) - time.monotonic())

    def _advance(self, job: _Job, now: float, most: int) -> None:
        """Send the due frames of a request, at most `most`."""
        request, before = job.request, job.sent
        if request.per_second:
            most = min(most, 1 + int((now - job.due_at) * request.per_second))
        wanted = min(most, request.count - before)
        last = before + self._policy.grant(wanted)
        try:
            while job.sent < last and self._send(request):
                job.sent += 1
        finally:
            self._policy.give_back(last - job.sent)
        sent = job.sent - before
        if sent < wanted:
            job.due_at = now + RETRY_SECONDS  # the interface, or the limit of frames a second, lets more leave later
        elif request.per_second:
            job.due_at += sent / request.per_second

    def _send(self, request: TransmitRequest) -> bool:
        """Send a frame; return False when the interface takes none now."""
        self._check(request)  # link and policy are the present ones, not those of the time when a paced request began
        try:
            self._sockets[int(request.own_fcs)].sendto(request.frame, (request.interface, 0))
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.ENOBUFS):
                return False
            self.counters[FAILED] += 1
            raise _explain(error, request) from None
        self.counters[SENT] += 1
        return True

    def _check(self, request: TransmitRequest) -> None:
        name = request.interface
        self._obey(self._policy.refuse_interface(name))
        link = self._next_hops.link(name)
        if self._next_hops.blind:
            raise FrameError("unavailable", f"{name}: links can't be seen here (AF_NETLINK is refused)")
        if link is None:
            raise FrameError("bad_request", f"{name}: there is no such interface; `ip link` lists them")
        if not link.up:
            raise FrameError("unavailable", f"{name} is down, or has no carrier")
        check_frame(request, link)
        try:
            tags = parse_tags(request.frame)
        except ValueError as error:
            raise FrameError("bad_request", str(error)) from None
        self._obey(self._policy.refuse_frame(*tags))

    @staticmethod
    def _obey(refusal: Refusal | None) -> None:
        if refusal is not None:
            cause, message = refusal
            raise FrameError("not_permitted", message, cause)

    def _refuse(self, request: TransmitRequest, error: FrameError, sent: int = 0) -> None:
        self.counters[REFUSED] += 1
        if error.cause:
            self._audit.refuse(error.cause, 1, interface=request.interface, reason=str(error))
        self._answer(request.reply, TransmitReply(request.id, sent, error.word, str(error)))

    def close(self) -> None:
        """Answer requests whose frames will not be sent any more."""
        for job in self._jobs:
            self._refuse(
                job.request, FrameError("unavailable", "the transmitter is shutting down; try again"), job.sent
            )
        self._jobs.clear()


def check_frame(request: TransmitRequest, link: Link) -> None:
    """Raise FrameError unless the link can carry the frame."""
    size = len(request.frame) - (FCS_SIZE if request.own_fcs else 0)
    if size < ETHERNET_HEADER:
        raise FrameError("bad_request", f"a frame has at least {ETHERNET_HEADER} bytes, this one {size}")
    tagged = int.from_bytes(request.frame[12:14]) == VLAN
    most = link.mtu + ETHERNET_HEADER + (VLAN_TAG if tagged else 0)
    if size > most:
        message = f"a frame on {link.name} has at most {most} bytes (MTU {link.mtu}), this one {size}"
        raise FrameError("bad_request", message)


def _explain(error: OSError, request: TransmitRequest) -> FrameError:
    if error.errno in NO_INTERFACE:
        return FrameError("unavailable", f"{request.interface}: {os.strerror(error.errno)}")
    if error.errno == errno.EPROTONOSUPPORT:
        return FrameError(
            "bad_request",
            f"the driver of {request.interface} can't leave its own check sequence out; send without own_fcs",
        )
    return FrameError("unavailable", f"{request.interface}: {error.strerror}")
