"""Limit of repeats in the log: a peer may provoke an event as often as it likes, but the log stays short."""

import math
import time
from collections.abc import Callable
from threading import Lock
from typing import Final

SECONDS: Final = 1.0
MAX_EVENTS: Final = 256
"""Events remembered at a time. Further ones within `SECONDS` are not logged: their text is chosen by a peer."""

LINES_A_SECOND: Final = 2
LINES_AT_ONCE: Final = 32


class LogLimit:
    """Lets each event be logged once in `seconds` at most, with the number of those left out since."""

    def __init__(self, seconds: float = SECONDS, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._clock = clock
        self._known: dict[str, tuple[float, int]] = {}
        """Time at which each was last logged, and the number left out since; the one unseen for longest is first."""
        self._turn = Lock()  # threads log, too

    def admit(self, event: str, count: int = 1) -> int:
        """Return the number to log now: these `count` and those left out before. 0: log nothing."""
        now = self._clock()
        with self._turn:
            said_at, unsaid = self._known.pop(event, (-math.inf, 0))
            if now - said_at < self._seconds:
                self._known[event] = said_at, unsaid + count
                return 0
            if len(self._known) == MAX_EVENTS:
                first = next(iter(self._known))
                if now - self._known[first][0] < self._seconds:
                    return 0
                del self._known[first]
            self._known[event] = now, 0
            return unsaid + count


class LogBudget:
    """Lets some lines of one kind be logged a second, whatever they are about.

    Who signs up often, under ever new names, must not fill the disk with lines on the fate of each.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._left, self._as_of, self._unsaid = float(LINES_AT_ONCE), clock(), 0

    def admit(self) -> int:
        """Return the number of lines that one logged now stands for: itself, and those left out. 0: log nothing."""
        now = self._clock()
        self._left = min(LINES_AT_ONCE, self._left + (now - self._as_of) * LINES_A_SECOND)
        self._as_of = now
        if self._left < 1:
            self._unsaid += 1
            return 0
        self._left -= 1
        unsaid, self._unsaid = self._unsaid, 0
        return 1 + unsaid
