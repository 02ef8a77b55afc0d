"""Limit of repeats in the log: a peer may provoke an event as often as it likes, but the log stays short."""

import math
import time
from collections.abc import Callable
from threading import Lock
from typing import Final

SECONDS: Final = 1.0
MAX_EVENTS: Final = 256
"""Events remembered at a time. Further ones within `SECONDS` are not logged: their text is chosen by a peer."""


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
