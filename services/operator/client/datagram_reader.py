"""Datagrams as they pass the bus, for a command that shows or keeps them, and its words on standard error."""

import time
from typing import Final

from services.operator.cli.output import say
from shared.bus.continuity import Continuity
from shared.bus.messages import Message
from shared.datagrams.batch import DatagramBatch

PATIENCE_SECONDS: Final = 2.0
"""Ingest answers a new subscription at once; if it has not by then, it is not there."""


class DatagramReader:
    """Leaves out repeated messages, counts missed datagrams, and reports both these and the absence of ingest.

    `doing` and `what` are words of the report, such as `watching` and `all streams`; `slower` names the work here that
    may be slower than datagrams come.
    """

    def __init__(self, doing: str, what: str, slower: str) -> None:
        self._doing, self._what, self._slower = doing, what, slower
        self._continuity = Continuity()
        self._missed = self._missed_said = 0
        self._speak_at = time.monotonic() + PATIENCE_SECONDS
        self.connected_at: float | None = None
        """The time of the monotonic clock at which ingest answered."""

    def take(self, message: Message) -> DatagramBatch | None:
        """Return a message's batch, unless it has none or is a repeat. An empty one shows that ingest is there."""
        if message.batch is None:
            return None
        missed = self._continuity.observe(message.topic, message.envelope, len(message.batch))
        if missed is None:
            return None
        self._missed += missed
        if self.connected_at is None:
            self.connected_at, self._speak_at = time.monotonic(), 0.0
            say(f"{self._doing} {self._what}")
        return message.batch

    def report_progress(self, *, last: bool = False) -> None:
        """Report datagrams missed, at most once a second, or that no ingest answers."""
        now = time.monotonic()
        if now < self._speak_at and not last:
            return
        if self._missed > self._missed_said:
            self._missed_said, self._speak_at = self._missed, now + 1.0
            say(f"{self._missed} datagrams missed so far: they come faster than they are {self._slower}")
        elif self.connected_at is None and not last:
            self._speak_at = float("inf")
            say(f"waiting for ingest: no worker publishes {self._what} yet")
