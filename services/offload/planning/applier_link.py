"""The planner's end of the socket pair to the applier, whose end is the end of the rules."""

import itertools
import os
import signal
import socket
from contextlib import suppress
from typing import Final

from services.offload.channel import WAITS, Answer, ClosedError, Request, RequestKind, UnfitError, receive, send
from services.offload.kernel_plan import KernelPlan

ANSWER_SECONDS: Final = 10.0
"""Time for the applier to answer, as far as the planner itself runs: a plan of 10,000 copies takes two."""
ENDED: Final = "the applier has ended, and its rules with it"


class ApplierLink:
    """Requests to the applier, and its answers. `channel` is None where there is no applier, for a `reason`.

    `process` is the applier's pid; as a child of this process that nobody waits for it keeps it beyond its end.
    """

    def __init__(self, channel: socket.socket | None, reason: str, process: int = 0) -> None:
        self.channel = channel
        self.reason = reason
        self._process = process
        self._numbers = itertools.count(1)

    def ask(self, kind: RequestKind, plan: KernelPlan | None = None, seconds: float = ANSWER_SECONDS) -> Answer:
        """Ask the applier, and wait for its answer; one that has ended, or does not answer, has an error for all."""
        if self.channel is None:
            return Answer(0, self.reason)
        request = Request(kind, next(self._numbers), plan)
        self.channel.settimeout(seconds / WAITS)
        try:
            send(self.channel, request)
            while (answer := receive(self.channel, Answer)).number != request.number:
                pass
        except (ClosedError, UnfitError, TimeoutError) as error:
            self._end(type(error).__name__)
            return Answer(request.number, self.reason)
        return answer

    @property
    def ended(self) -> bool:
        """Return whether there is no applier any more, though nothing was asked of it."""
        if self.channel is not None:
            self.channel.settimeout(0)
            try:
                if not self.channel.recv(1, socket.MSG_PEEK):
                    self._end(ClosedError.__name__)
            except BlockingIOError:
                pass
            except ConnectionResetError as error:
                self._end(type(error).__name__)
        return self.channel is None

    def _end(self, cause: str) -> None:
        """Close the channel, and end an applier that is still there: one that stands still would keep its rules."""
        self.close()
        if self._process:
            with suppress(ProcessLookupError):
                os.kill(self._process, signal.SIGKILL)
        self.reason = f"{ENDED} ({cause})"

    def close(self) -> None:
        """Close the channel."""
        if self.channel is not None:
            self.channel.close()
        self.channel = None
