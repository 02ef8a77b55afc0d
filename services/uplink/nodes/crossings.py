"""Crossings of a stream: which count of this bus stands for which counts of its origins, and back. No I/O.

The uplink publishes the batches of many origins as one worker. A sender of copies here knows only that worker's running
count. Other nodes know the counts of the origins, as each of them numbers its datagrams differently.
"""

import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

from services.uplink.incoming.arrivals import Key

SECONDS: Final = 15.0
"""Time for which a crossing is known: longer than a node's last place is of use to the one that follows it."""
STARTS: Final = 2
"""Starts of a worker whose last count is known: a node that comes back may still be handing on the one before."""
MAX_WORKERS: Final = 1024
"""Workers that are known so; the one that has sent nothing for longest goes first."""


class _Crossing(NamedTuple):
    """A batch: its place in the count of its origin, and in that of this bus; it may have fewer datagrams here."""

    at: float
    origin: Key
    there: range
    here: range

    def there_at(self, here: int) -> int:
        """Return the count of the origin within which all is that this bus has before a count; never too much."""
        if here >= self.here.stop:
            return self.there.stop
        return self.there.start + (here - self.here.start if self.whole else 0)

    def here_at(self, there: int) -> int:
        """Likewise the other way round."""
        return self.here.start + (max(0, there - self.there.start) if self.whole else 0)

    @property
    def whole(self) -> bool:
        """True if all of its datagrams were published here."""
        return len(self.there) == len(self.here)


class Crossings:
    """The latest batches of other sites that were published here on one stream."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.end = 0
        """The count of this bus behind the last one."""
        self._clock = clock
        self._latest: deque[_Crossing] = deque()
        self._older: dict[tuple[str, str], dict[Key, int]] = {}
        """By site and worker: the counts of its last starts behind what is not known singly any more."""
        self._ends: dict[Key, int] = {}
        """By origin: its count behind the last batch that came here."""

    def note(self, origin: Key, there: range, here: range) -> None:
        """Note a batch by its place in the count of its origin, and in that of this bus.

        What this bus has had by another way, or nobody wants here, is in the first alone.
        """
        now = self._clock()
        self._latest.append(_Crossing(now, origin, there, here))
        self.end, self._ends[origin] = here.stop, there.stop
        while self._latest[0].at < now - SECONDS:
            old = self._latest.popleft()
            worker = old.origin.site, old.origin.worker
            self._older[worker] = starts = self._older.pop(worker, {})
            starts.pop(old.origin, None)
            starts[old.origin] = old.there.stop
            if len(starts) > STARTS:
                earliest = next(iter(starts))
                del starts[earliest]
                self._ends.pop(earliest, None)
            if len(self._older) > MAX_WORKERS:
                for each in self._older.pop(next(iter(self._older))):
                    self._ends.pop(each, None)

    def origins_at(self, here: int) -> dict[Key, int]:
        """Return the count of each origin behind a count of this bus."""
        found = {origin: count for starts in self._older.values() for origin, count in starts.items()}
        for each in self._latest:
            if each.here.start > here or (each.here.start == here and each.here):
                break
            found[each.origin] = each.there_at(here)
        return found

    def knows(self, origin: Key) -> bool:
        """Return whether anything of an origin has come here."""
        return origin in self._ends

    def has(self, origin: Key, total: int) -> bool:
        """Return whether all within a count of an origin has come here, if anything of it has."""
        return self._ends.get(origin, total) >= total

    def here_at(self, reached: Mapping[Key, int]) -> int:
        """Return the count of this bus up to which all is within these counts of the origins.

        Some that is behind it may be within them, too: batches of origins come in another order elsewhere.
        """
        for each in self._latest:
            if each.here and each.there.stop > reached.get(each.origin, 0):
                return each.here_at(reached.get(each.origin, 0))
        return self.end
