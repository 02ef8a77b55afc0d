"""Stops expiry when too many renewals are missing at once: the clients are hardly at fault. No I/O.

After Eureka's self-preservation: https://github.com/Netflix/eureka/wiki/Server-Self-Preservation-Mode
"""

import math
from collections import deque
from collections.abc import Iterable
from typing import Final

from services.gateway.registry.entry import Entry
from shared.log import get_logger

BELOW: Final = 0.85
"""Share of the renewals that were due; below it, expiry stops."""
WINDOW_SECONDS: Final = 60.0
"""Renewals that were due longer ago say nothing of a fault now."""
MIN_CLIENTS: Final = 10
"""Least number of leases due in the window: of fewer, one or two missing mean nothing."""

log = get_logger()


class Preservation:
    """Stops or resumes expiry, by the leases that were due lately; for at most `seconds`, 0: never."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._since = math.inf
        self._expired_at: deque[float] = deque()

    @property
    def holds(self) -> bool:
        """Return whether nothing expires now."""
        return self._since < math.inf

    def note_expired(self, count: int, now: float) -> None:
        """Note that `count` clients have expired: their renewals are missing for the rest of the window."""
        self._expired_at.extend([now] * count)

    def judge(self, entries: Iterable[Entry], overdue: int, now: float) -> None:
        """Stop or resume expiry, by all entries and the number of them that should expire now."""
        begin = now - WINDOW_SECONDS
        while self._expired_at and self._expired_at[0] <= begin:
            self._expired_at.popleft()
        renewed = sum(begin < entry.renewed_at and now < entry.expires_at < math.inf for entry in entries)
        missing = overdue + len(self._expired_at)
        due = renewed + missing
        too_many = overdue > 0 and due >= MIN_CLIENTS and renewed < BELOW * due
        if too_many and not self.holds and self._seconds:
            self._since = now
            event = "too many renewals are missing at once: no lease expires for now; check the network to the clients"
            log.warning(event, missing=missing, due=due, for_seconds=self._seconds)
        elif self.holds and not (too_many and now < self._since + self._seconds):
            self._since = math.inf
            log.warning("leases expire again", missing=missing, due=due)
