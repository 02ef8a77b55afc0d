"""Stops expiry when too many renewals from other hosts are missing: the clients are hardly at fault. No I/O.

After Eureka's self-preservation: https://github.com/Netflix/eureka/wiki/Server-Self-Preservation-Mode
"""

import math
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from services.gateway.registry.entry import Entry
from shared.log import get_logger

BELOW: Final = 0.85
"""Share of the renewals that were due; below it, expiry stops."""
WINDOW_SECONDS: Final = 60.0
"""Renewals that were due longer ago say nothing of a fault now."""
MIN_CLIENTS: Final = 10
"""Least number of clients with leases due in the window: of fewer, one or two missing mean nothing."""

log = get_logger()


class ExpiryPause:
    """Stops or resumes expiry, by the leases that were due lately.

    It stops for at most `seconds`, which is `[gateway] preserve_seconds`; 0: never.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._since = math.inf
        self._expired: deque[tuple[float, str]] = deque()
        """Time, and whose lease."""

    @property
    def holds(self) -> bool:
        """Return whether nothing expires now."""
        return self._since < math.inf

    def note_expired(self, entries: Iterable[Entry], now: float) -> None:
        """Note entries that have expired: their renewals are missing for the rest of the window."""
        self._expired.extend((now, entry.peer.rights.holder) for entry in entries)

    def judge(self, entries: Iterable[Entry], overdue: Sequence[Entry], now: float) -> None:
        """Stop or resume expiry, by all entries and those that should expire now."""
        begin = now - WINDOW_SECONDS
        while self._expired and self._expired[0][0] <= begin:
            self._expired.popleft()
        lacking = Counter(entry.peer.rights.holder for entry in overdue)
        lacking.update(holder for _, holder in self._expired)
        there = Counter(
            entry.peer.rights.holder
            for entry in entries
            if begin < entry.renewed_at and now < entry.expires_at < math.inf
        )
        due, renewed = _weigh(there, lacking)
        missing = round(due - renewed, 3)
        too_many = bool(overdue) and due >= MIN_CLIENTS and renewed < BELOW * due
        if too_many and not self.holds and self._seconds:
            self._since = now
            event = (
                "too many renewals are missing at once: no other host's lease expires for now; check the network there"
            )
            log.warning(event, missing=missing, due=due, for_seconds=self._seconds)
        elif self.holds and not (too_many and now < self._since + self._seconds):
            self._since = math.inf
            log.warning("leases expire again", missing=missing, due=due)


def _weigh(there: Mapping[str, int], lacking: Mapping[str, int]) -> tuple[int, float]:
    """Return of how many holders renewals were due, and of how many they came, by each one's numbers of leases.

    A holder counts as one, whatever its number of leases: it can't stop the others' expiry by itself.
    """
    holders = {*there, *lacking}
    return len(holders), sum(there.get(each, 0) / (there.get(each, 0) + lacking.get(each, 0)) for each in holders)
