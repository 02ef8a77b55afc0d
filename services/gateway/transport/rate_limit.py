"""The rate of requests from each origin: requests over it wait for their turn. No I/O."""

from collections.abc import Callable
from typing import Final

BURST_SECONDS: Final = 10.0
"""The requests of this time may come at once: all collectors behind one address sign up again after a restart."""


class RateLimit:
    """Lets `per_second` requests of each origin pass; remembers an origin only while it is faster.

    The generic cell rate algorithm: for each origin it keeps the time at which its requests would be done at that rate.
    At most `most_waiting` of an origin wait at a time, one for each connection. More than these would be requests of
    connections that have gone, and later ones do not wait for them.
    """

    def __init__(self, per_second: float, most_waiting: int, clock: Callable[[], float]) -> None:
        self._interval = 1 / per_second
        self._most = BURST_SECONDS + most_waiting * self._interval
        self._clock = clock
        self._over_at: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._over_at)

    def note_request(self, origin: str) -> float:
        """Note a request, and return the seconds that it has to wait."""
        now = self._clock()
        over_at = min(max(now, self._over_at.get(origin, now)) + self._interval, now + self._most)
        self._over_at[origin] = over_at
        return max(0.0, over_at - now - BURST_SECONDS)

    def forget_slow(self) -> None:
        """Forget every origin whose requests were no faster than the rate."""
        now = self._clock()
        self._over_at = {origin: over_at for origin, over_at in self._over_at.items() if over_at > now}
