"""How often the log says the same: who provokes an event decides how often it happens, not how long the log gets."""

import math
import time
from collections.abc import Callable
from threading import Lock
from typing import Final

SECONDS: Final = 1.0
MAX_EVENTS: Final = 256
"""Kept in mind at a time. More different ones in `SECONDS` are not said: whoever provokes them chooses their text."""


class LogLimit:
    """Has each event said once in `seconds` at most, and then how many of them there were meanwhile."""

    def __init__(self, seconds: float = SECONDS, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._clock = clock
        self._known: dict[str, tuple[float, int]] = {}
        """When each was last said, and how many were not said since; the one that has not come for longest is first."""
        self._turn = Lock()  # threads log, too

    def admit(self, event: str, count: int = 1) -> int:
        """Return of how many to speak now: of these `count`, and of those before that were not said. 0: say nothing."""
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
