"""The choice of what has to go from the journal: whole segments, the oldest first. No I/O."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Final

from shared.journal.segments import SECOND, Segment

UNTRUSTED_SECONDS: Final = 3600.0
"""Time for which nothing is removed for its age: by then the clock is synchronized, or somebody has seen it."""
SET_SECONDS: Final = 10.0
"""A clock that is set ahead by less costs nothing."""


@dataclass(frozen=True, slots=True)
class Kept:
    """A segment that is there, the bytes that it takes, and the time since which nothing was added to it.

    One that is `busy` is being written or sealed, and stays. One that is `stuck` could not be removed: that is tried
    again, and nothing is expected of it.
    """

    segment: Segment
    size: int
    ended_ns: int
    busy: bool = False
    stuck: bool = False


@dataclass(frozen=True, slots=True)
class Bounds:
    """The bounds of the journal: bytes and age of what is kept, and bytes that stay free on its disk; 0: no bound."""

    size: int
    age_seconds: float
    free: int


class KnownAge:
    """Tells whether segments are as old as the clock makes them: not soon after a start, or after it was set ahead.

    A clock that is a month ahead for a minute, as before it is synchronized, would otherwise cost all that there is.

    >>> known = KnownAge(7 * 86400, 0.0, 1000.0)
    >>> [known.at(now, time) for now, time in ((1, 1001), (3600, 4600), (3601, 99999), (7200, 103598), (7201, 103599))]
    [False, True, False, False, True]
    """

    def __init__(self, age_seconds: float, now: float, unix_time: float) -> None:
        self._seconds = min(UNTRUSTED_SECONDS, age_seconds)
        self._ahead, self._since = unix_time - now, now + self._seconds

    def at(self, now: float, unix_time: float) -> bool:
        """Return whether it is known now; `now` is of a clock that is never set, `unix_time` of one that may be."""
        before, self._ahead = self._ahead, unix_time - now
        if self._ahead > before + SET_SECONDS:
            self._since = now + self._seconds
        return now >= self._since


def expired(kept: Iterable[Kept], limits: Bounds, now_ns: int, free: int) -> list[Kept]:
    """Return what has to go for the limits to be met, oldest first; `free` bytes are free on the disk now.

    Segments that are busy are counted.

    >>> one, two = (Kept(Segment("s", n, n * SECOND), 100, (n + 1) * SECOND) for n in (1, 2))
    >>> [each.segment.number for each in expired([two, one], Bounds(150, 0, 0), 9 * SECOND, 0)]
    [1]
    >>> [each.segment.number for each in expired([two, one], Bounds(0, 6.5, 0), 9 * SECOND, 0)]
    [1]
    >>> [each.segment.number for each in expired([two, one], Bounds(0, 0, 500), 9 * SECOND, 350)]
    [1, 2]
    >>> ahead = Kept(Segment("s", 1, 0), 100, 99 * SECOND)
    >>> [each.segment.number for each in expired([two, ahead], Bounds(150, 0, 0), 9 * SECOND, 0)]
    [1]
    >>> stuck = Kept(one.segment, 100, one.ended_ns, stuck=True)
    >>> [each.segment.number for each in expired([two, stuck], Bounds(150, 0, 0), 9 * SECOND, 0)]
    [1, 2]
    """
    kept = [*kept]
    over = sum(each.size for each in kept) - limits.size if limits.size else 0
    short = limits.free - free if limits.free else 0
    since_ns = now_ns - int(limits.age_seconds * SECOND) if limits.age_seconds else 0
    if over <= 0 and short <= 0 and all(each.ended_ns >= since_ns for each in kept):  # as nearly each time
        return []
    kept = sorted(_timed(kept, now_ns), key=lambda each: (each.ended_ns, each.segment.stream, each.segment.number))
    going = []
    for each in kept:
        if each.busy or not (over > 0 or short > 0 or each.ended_ns < since_ns):
            continue
        going.append(each)
        if not each.stuck:
            over, short = over - each.size, short - each.size
    return going


def _timed(kept: Iterable[Kept], now_ns: int) -> Iterator[Kept]:
    """Yield segments; one of a time to come, as the clock was set back since, with that of its successor."""
    following: dict[str, int] = {}
    for each in sorted(kept, key=lambda each: each.segment.number, reverse=True):
        stream = each.segment.stream
        following[stream] = each.ended_ns if each.ended_ns <= now_ns else following.get(stream, now_ns)
        yield replace(each, ended_ns=following[stream]) if each.ended_ns > now_ns else each
