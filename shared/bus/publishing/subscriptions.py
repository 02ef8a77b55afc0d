"""The prefixes that a publisher's subscribers ask for. No I/O.

A broker that ends takes nothing back, and its successor asks for what is wanted then. So what was asked for before the
connection was lost, and is not asked for anew soon after there is another one, is wanted no more.
"""

import math
import time
from collections.abc import Callable
from typing import Final

CHECK_SECONDS: Final = 1.0
RENEW_SECONDS: Final = 2.0
"""Time for subscribers to find a new broker: they try at least twice a second."""


class Subscriptions:
    """Follows what the broker says, of which `hello` is asked for in each connection; `most` prefixes are kept."""

    def __init__(self, hello: str, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._hello = hello.encode()
        self._most = most
        self._clock = clock
        self._asked: dict[bytes, float] = {}
        """By prefix the time at which it was last asked for."""
        self._wanted: dict[str, bool] = {}
        self._checked_at = self._lost_at = clock()
        self._drop_at = math.inf

    @property
    def connected(self) -> bool:
        """Return whether a broker has been observed, and not been lost since."""
        return self._hello in self._asked

    @property
    def due(self) -> bool:
        """Return whether it is time for another `check`."""
        return self._clock() >= self._checked_at + CHECK_SECONDS

    def wanted(self, topic: str) -> bool:
        """Return whether anyone subscribes to a topic."""
        known = self._wanted.get(topic)
        if known is None:
            known = self._wanted[topic] = any(topic.encode().startswith(prefix) for prefix in self._asked)
        return known

    def check(self, *, disconnected: bool) -> None:
        """Do what is due, after a connection was lost since the last call or not; before each reading with `note`."""
        now = self._clock()
        if disconnected:
            self._lost_at = self._checked_at  # or later: what was said since may be of the next connection
            self._drop_at = now + RENEW_SECONDS
            if self._asked.get(self._hello, now) < self._lost_at:
                self._drop_at = math.inf
                self._keep({prefix: at for prefix, at in self._asked.items() if prefix != self._hello})
        elif now >= self._drop_at:
            self._drop_at = math.inf
            self._keep({prefix: at for prefix, at in self._asked.items() if at >= self._lost_at})
        self._checked_at = now

    def _keep(self, asked: dict[bytes, float]) -> None:
        self._asked = asked
        self._wanted.clear()

    def note(self, said: bytes) -> str | None:
        """Take in what the broker has said; return the prefix if it asks for one."""
        prefix = said[1:]
        self._wanted.clear()
        if said[:1] == b"\x00":
            self._asked.pop(prefix, None)
        if said[:1] != b"\x01" or (len(self._asked) >= self._most and prefix not in self._asked):
            return None
        self._asked[prefix] = self._clock()
        if prefix == self._hello:
            self._drop_at = min(self._drop_at, self._clock() + RENEW_SECONDS)
        return prefix.decode("utf-8", "replace")
