"""Division of all source addresses into ranges, each with the copies whose prefixes cover it. No I/O."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from services.offload.kernel_plan import Prefix

MAX_RENDERED: Final = 40_000
"""Copies that the chains of one stream may hold: overlapping prefixes have a chain for each set of copies."""
Range = tuple[int, frozenset[int]]
"""The number of the first address, and the places of the copies that are of it and all up to the next range."""


class TooManyError(ValueError):
    """The different sets of copies have more members in all than there may be."""


def divide(copies: Mapping[int, Sequence[Prefix]], bits: int, most: int = MAX_RENDERED) -> list[Range]:
    r"""Return the ranges of an address space of `bits` bits, in order from 0 on, neighbours different.

    TooManyError: their sets of copies have more than `most` members, each different set counted once.

    >>> divide({7: [Prefix(b"\x0a\0\0\0", 8)]}, 32)
    [(0, frozenset()), (167772160, frozenset({7})), (184549376, frozenset())]
    """
    changes: dict[int, list[tuple[int, int]]] = {}
    for place, prefixes in copies.items():
        for first, end in _ranges(prefixes, bits):
            changes.setdefault(first, []).append((place, 1))
            changes.setdefault(end, []).append((place, -1))
    covered: dict[int, int] = {}
    sets: dict[frozenset[int], frozenset[int]] = {
        frozenset(): frozenset()
    }  # each once: ranges may be many more than sets
    ranges: list[Range] = [(0, sets[frozenset()])]
    for start in sorted(changes):
        for place, change in changes[start]:
            covered[place] = covered.get(place, 0) + change
            if not covered[place]:
                del covered[place]
        now = frozenset(covered)
        if now not in sets:
            sets[now] = now
            most -= len(now)
            if most < 0:
                raise TooManyError
        now = sets[now]
        if start == 1 << bits or now == ranges[-1][1]:
            continue
        if start == ranges[-1][0]:
            ranges.pop()
        ranges.append((start, now))
    return ranges


def _ranges(prefixes: Iterable[Prefix], bits: int) -> Iterable[tuple[int, int]]:
    """Yield the first number of each prefix of this address length, and the one behind its last."""
    for prefix in prefixes:
        if len(prefix.address) * 8 == bits and prefix.length <= bits:
            size = 1 << bits - prefix.length
            first = int.from_bytes(prefix.address, "big") & ~(size - 1)
            yield first, first + size
