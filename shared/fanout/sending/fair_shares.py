"""Fair shares among collectors' addresses when copies are more than can be sent. Pure: decides, and sends nothing.

Without them a client that signs up a thousand times would starve all others: what the service has no time for is lost
on the bus, whoever it is for.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Final, Generic, TypeVar

ALERT_SECONDS: Final = 60.0
"""After a loss on the bus shares are watched for this long: before, what waits may still find its time."""
BEHIND_SECONDS: Final = 0.5
IDLE_SECONDS: Final = 0.001
"""The service is behind when it has worked for so long, and never waited this long for a message. What it does between
messages, such as a report on thousands of collectors, is work."""
HALF_LIFE_SECONDS: Final = 1.0

T = TypeVar("T")


class FairShares(Generic[T]):
    """Limits each address to its share of the copies, after a loss, while the service is behind.

    An address that wants no more than the mean of all gets everything. One that wants more gets copies as long as it
    has not had more than the mean.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._alert_until = self._halve_at = 0.0
        self._busy_since = self._wait_began = clock()
        self._wanted: Counter[str] = Counter()
        self._given: Counter[str] = Counter()
        """Copies by address, of late: those that its collectors wanted, and those that were within its share."""

    def note_loss(self) -> None:
        """Note that messages were lost on their way here, since they came faster than they were taken."""
        now = self._clock()
        if now >= self._alert_until:
            self._wanted.clear()
            self._given.clear()
        self._alert_until = now + ALERT_SECONDS

    def begin_wait(self) -> None:
        """Note that the service begins to wait for messages."""
        self._wait_began = self._clock()

    def end_wait(self) -> None:
        """Note that messages have come, or something else to do."""
        now = self._clock()
        if now - self._wait_began >= IDLE_SECONDS:
            self._busy_since = now

    @property
    def watching(self) -> bool:
        """Return whether there was a loss of late: else everything is within its share."""
        return self._clock() < self._alert_until

    def divide(self, wishes: Sequence[tuple[str, int, T]]) -> tuple[list[T], list[T]]:
        """Divide what is to be sent: return what is within its address's share now, and what is over it.

        A wish is an address, a number of copies, and what they are for.
        """
        now = self._clock()
        behind = now - self._busy_since >= BEHIND_SECONDS
        if behind:
            self._alert_until = now + ALERT_SECONDS
        if now >= self._halve_at:
            self._halve_at = now + HALF_LIFE_SECONDS
            self._wanted, self._given = _halves(self._wanted), _halves(self._given)
        for address, count, _ in wishes:
            self._wanted[address] += count
            self._given[address] += 0
        over = _above_mean(self._wanted) & _above_mean(self._given) if behind and wishes else set()
        for address, count, _ in wishes:
            self._given[address] += count * (address not in over)
        within = [what for address, _, what in wishes if address not in over]
        return within, [what for address, _, what in wishes if address in over]


def _halves(counts: Counter[str]) -> Counter[str]:
    return Counter({address: count // 2 for address, count in counts.items() if count > 1})


def _above_mean(counts: Counter[str]) -> set[str]:
    mean = counts.total() / len(counts)
    return {address for address, count in counts.items() if count > mean}
