"""Stretches of numbers, each from a start to before a stop, and gaps between them. No I/O.

All takes linear time for what is in order: who forges numbers may make as many gaps as datagrams.
"""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(slots=True)
class Hole:
    """Numbers from `start` to before `stop` that have not come; `old` once a `settle` has seen it."""

    start: int
    stop: int
    old: bool = False


def moved(stretches: Iterable[tuple[int, int]], shift: int) -> list[tuple[int, int]]:
    """Return stretches in another count."""
    return [(start + shift, stop + shift) for start, stop in stretches]


def overlap(one: Sequence[tuple[int, int]], other: Sequence[tuple[int, int]]) -> bool:
    """Return whether stretches of both, each in order, have a number in common."""
    first = second = 0
    while first < len(one) and second < len(other):
        if max(one[first][0], other[second][0]) < min(one[first][1], other[second][1]):
            return True
        if one[first][1] < other[second][1]:
            first += 1
        else:
            second += 1
    return False


def without(holes: Iterable[Hole], stretches: Iterable[tuple[int, int]]) -> list[Hole]:
    """Return gaps less some stretches of numbers, in linear time for what is in order."""
    taken: list[tuple[int, int]] = []
    for low, high in sorted(stretches):
        if taken and low <= taken[-1][1]:
            taken[-1] = taken[-1][0], max(taken[-1][1], high)
        elif low < high:
            taken.append((low, high))
    ends, left = [high for _, high in taken], []
    for hole in holes:
        start = hole.start
        for at in range(bisect_right(ends, start), len(taken)):
            low, high = taken[at]
            if low >= hole.stop:
                break
            if start < low:
                left.append(Hole(start, low, hole.old))
            start = high
        if start < hole.stop:
            left.append(Hole(start, hole.stop, hole.old))
    return left
