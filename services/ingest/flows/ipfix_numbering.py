"""Place of an IPFIX exporter's number: before the records of its datagram or behind them. No I/O.

RFC 7011, 3.1 is mostly read as *before*; some exporters, such as softflowd, count a datagram's own records in. Two
datagrams with nothing lost between them show it, unless they have equally many records, and then it does not matter.
"""

from typing import Final

import numpy as np
import numpy.typing as npt

from shared.datagrams.export_headers import Integers

CERTAIN: Final = 8
"""Limit of the datagrams that count for a finding: this many in a row have to show the opposite."""
Mask = npt.NDArray[np.bool_]


class Numbering:
    """Findings about the exporters, by slot: above 0 for *before*, below 0 for *behind*, 0 for nothing."""

    def __init__(self, capacity: int) -> None:
        self._shown = np.zeros(capacity, np.int8)
        self._number = np.zeros(capacity, np.int64)
        self._count = np.full(capacity, -1, np.int64)
        """Records of the last datagram; -1: not known."""

    def forget(self, slot: int) -> None:
        """Free a slot for another exporter."""
        self._shown[slot], self._count[slot] = 0, -1

    def due(self, slot: int) -> int:
        """Return the number that is to come next as most read the document: the last one and its records, if known."""
        return int(self._number[slot]) + (max(0, int(self._count[slot])) if self._shown[slot] >= 0 else 0)

    def unify(
        self, slots: Integers, first: Mask, numbers: Integers, counts: Integers, sure: Mask
    ) -> tuple[Integers, Integers, Mask, list[int]]:
        """Return numbers as of *before* the records, counts, whether these are sure, and slots to follow anew.

        Arguments are as for `SequenceTracker.track`. For an exporter without a finding, no count is sure.
        """
        groups, last = np.cumsum(first) - 1, np.append(first[1:], True)
        told = np.where(sure, counts, -1)
        number_before, count_before = np.roll(numbers, 1), np.roll(told, 1)
        number_before[first], count_before[first] = self._number[slots], self._count[slots]
        apart = (numbers - number_before) & 0xFFFFFFFF
        pairs = (told >= 0) & (count_before >= 0)
        before, behind = pairs & (apart == count_before), pairs & (apart == told)
        was = self._shown[slots]
        now = was.astype(np.int64)
        np.add.at(now, groups, before.astype(np.int64) - behind)
        equal = np.zeros(len(slots), bool)
        equal[groups[before & behind]] = True
        now = np.clip(np.where((now == 0) & equal, np.where(was < 0, -1, 1), now), -CERTAIN, CERTAIN)
        self._shown[slots], self._number[slots], self._count[slots] = now, numbers[last], told[last]
        shown = now[groups]
        numbers = np.where(shown < 0, (numbers - counts) & 0xFFFFFFFF, numbers)
        return numbers, np.where(shown == 0, 0, counts), sure & (shown != 0), slots[(now < 0) != (was < 0)].tolist()
