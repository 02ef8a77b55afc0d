"""Crossings of a stream: which count of this bus stands for which counts of its origins, and back. No I/O.

The uplink publishes the batches of many origins as one worker. A sender of copies here knows only that worker's running
count. Other nodes know the counts of the origins, as each of them numbers its datagrams differently.
"""

import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from operator import itemgetter
from typing import Final, NamedTuple

from services.uplink.incoming.arrivals import Key

SECONDS: Final = 15.0
"""Time for which a crossing is known: longer than a node's last place is of use to the one that follows it."""
STARTS: Final = 2
"""Starts of a worker that are known: a node that comes back may still be handing on the one before."""
MAX_WORKERS: Final = 1024
"""Workers that are known so; the one that has sent nothing for longest goes first."""
MARKS: Final = 64
"""Places of an origin that are kept for longer, where a journal can be read from them; older ones are further apart."""


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
    """The latest batches of other sites that were published here on one stream, with a journal or without."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, *, journaled: bool = False) -> None:
        self.end = 0
        """The count of this bus behind the last one."""
        self._clock = clock
        self._journaled = journaled
        self._latest: deque[_Crossing] = deque()
        self._older: dict[tuple[str, str], dict[Key, int]] = {}
        """By site and worker: the counts of its last starts behind what is not known singly, if it came here at all."""
        self._ends: dict[Key, int] = {}
        """By origin: its count behind the last batch that came here."""
        self._marks: dict[Key, list[tuple[int, int]]] = {}
        """By origin: counts of it, each with the count of this bus from which on is here what came behind."""

    def note(self, origin: Key, there: range, here: range) -> None:
        """Note a batch by its place in the count of its origin, and in that of this bus.

        What this bus has had by another way, or nobody wants here, is in the first alone.
        """
        now = self._clock()
        if origin not in self._ends:
            self._note_older(origin, there.start, here.start)
        self._latest.append(_Crossing(now, origin, there, here))
        self.end, self._ends[origin] = here.stop, there.stop
        while self._latest[0].at < now - SECONDS:
            old = self._latest.popleft()
            if old.origin in self._ends:
                self._note_older(old.origin, old.there.stop, old.here.stop)

    def _note_older(self, origin: Key, there: int, here: int) -> None:
        worker = origin.site, origin.worker
        self._older[worker] = starts = self._older.pop(worker, {})
        starts[origin] = there
        if self._journaled:
            marks = self._marks.setdefault(origin, [])
            marks.append((there, here))
            if len(marks) > MARKS:
                del marks[1::2]
        if len(starts) > STARTS:
            earliest = next(iter(starts))
            del starts[earliest]
            self._forget(earliest)
        if len(self._older) > MAX_WORKERS:
            for each in self._older.pop(next(iter(self._older))):
                self._forget(each)

    def _forget(self, origin: Key) -> None:
        self._ends.pop(origin, None)
        self._marks.pop(origin, None)

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
        """Return the count of this bus up to which all is within these counts of the origins, as far as that is known.

        Some that is behind it may be within them, too: batches of origins come in another order elsewhere. What is
        `lacked` is before it.
        """
        here, reached = self.end, self._with_earlier(reached)
        for each in self._latest:
            if each.here and each.there.stop > reached.get(each.origin, 0):
                here = each.here_at(reached.get(each.origin, 0))
                break
        for origin, had, _ in self._older_lacked(reached) if self._journaled else ():
            marks = self._marks[origin]
            here = min(here, marks[max(0, bisect_right(marks, had, key=itemgetter(0)) - 1)][1])
        return here

    def lacked(self, reached: Mapping[Key, int]) -> int:
        """Return how many datagrams beyond these counts of the origins came here too long ago to be had."""
        return sum(
            max(0, (self._marks[origin][0][0] if self._journaled else older) - had)
            for origin, had, older in self._older_lacked(self._with_earlier(reached))
        )

    def _older_lacked(self, reached: Mapping[Key, int]) -> Iterator[tuple[Key, int, int]]:
        """Yield each origin of which more was here than these counts before it is known singly, with both counts."""
        for starts in self._older.values():
            for origin, older in starts.items():
                if (had := reached.get(origin, 0)) < older:
                    yield origin, had, older

    def _with_earlier(self, reached: Mapping[Key, int]) -> Mapping[Key, int]:
        """Return these counts, and all of an earlier start of a worker where they have its next one alone.

        Starts of a worker come one after the other: the node that tells has had the earlier one, and was restarted.
        """
        ended = {
            each: self._ends[each] for *earlier, last in self._older.values() if last in reached for each in earlier
        }
        return {**ended, **reached} if ended else reached
