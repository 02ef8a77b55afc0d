"""The choice of what has to go from the journal: whole segments, the oldest first. No I/O."""

from collections.abc import Iterable
from dataclasses import dataclass

from shared.journal.segments import SECOND, Segment


@dataclass(frozen=True, slots=True)
class Kept:
    """A segment that is there, the bytes that it takes, and the time since which nothing was added to it.

    One that is `stuck` could not be removed. That is tried again, and nothing is expected of it.
    """

    segment: Segment
    size: int
    ended_ns: int
    stuck: bool = False


@dataclass(frozen=True, slots=True)
class Bounds:
    """The bounds of the journal: bytes and age of what is kept, and bytes that stay free on its disk; 0: no bound."""

    size: int
    age_seconds: float
    free: int


def expired(kept: Iterable[Kept], limits: Bounds, now_ns: int, free: int) -> list[Kept]:
    """Return what has to go for the limits to be met, oldest first; `free` bytes are free on the disk now.

    Segments that are being written are counted, and stay.

    >>> one, two = (Kept(Segment("s", n, n * SECOND), 100, (n + 1) * SECOND) for n in (1, 2))
    >>> [each.segment.number for each in expired([two, one], Bounds(150, 0, 0), 9 * SECOND, 0)]
    [1]
    >>> [each.segment.number for each in expired([two, one], Bounds(0, 6.5, 0), 9 * SECOND, 0)]
    [1]
    >>> [each.segment.number for each in expired([two, one], Bounds(0, 0, 500), 9 * SECOND, 350)]
    [1, 2]
    >>> stuck = Kept(one.segment, 100, one.ended_ns, stuck=True)
    >>> [each.segment.number for each in expired([two, stuck], Bounds(150, 0, 0), 9 * SECOND, 0)]
    [1, 2]
    """
    kept = sorted(kept, key=lambda each: (each.ended_ns, each.segment.stream, each.segment.number))
    over = sum(each.size for each in kept) - limits.size if limits.size else 0
    short = limits.free - free if limits.free else 0
    going = []
    for each in kept:
        too_old = limits.age_seconds and each.ended_ns < now_ns - limits.age_seconds * SECOND
        if each.segment.is_open or not (over > 0 or short > 0 or too_old):
            continue
        going.append(each)
        if not each.stuck:
            over, short = over - each.size, short - each.size
    return going
