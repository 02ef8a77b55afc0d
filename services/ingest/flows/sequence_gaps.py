"""Losses before datagrams came to fanwire: exporters number what they send, and a gap in the numbers is missing.

No I/O.

Columns of a receive call go in, counters come out; no datagram is changed, dropped or delayed. `SequenceTracker` holds
the last facts of every exporter in arrays, and handles one exporter by itself only where something is out of order.

Gaps count as missed a second or two later: datagrams that were only overtaken fill them until then. An exporter that
reports a shorter uptime than before begins anew.

A far jump, either way, may be another exporter behind the same address and port, for example behind a relay. So numbers
may run in several series. The series before the jump is parked: if it continues, the jump was none. Only after it has
been silent for `PARKED_SECONDS` does the jump count as a gap, or as an exporter that began anew.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from services.ingest.flows.stretches import Hole, moved, overlap, without
from shared.datagrams.export_headers import Integers
from shared.ledger.counters import EXPORTER_REORDERED, EXPORTER_RESTARTS, EXPORTER_UNSURE

MAX_HOLES: Final = 8
"""Gaps of one exporter that overtaken datagrams may still fill."""
MAX_GAP: Final = 1 << 24
"""Numbers: no network loses more. An exporter that skips more, or falls back by more than `WINDOW`, has begun anew."""
WINDOW: Final = 1024
"""Numbers that a datagram may be behind, or ahead, and still be of the same series for sure."""
MAX_PARKED: Final = 4
"""Series kept besides the present one."""
PARKED_SECONDS: Final = 60
"""Calls of `settle` for which a series may be silent before the jump away from it counts."""
MAX_STEPS: Final = 1 << 17
"""Steps that comparing exporters' gaps may take between two calls of `settle`: about 50 ms. Numbers can be forged."""
UPTIME_SLACK_MS: Final = 10_000
"""An exporter whose uptime falls by this much was restarted; by less, its datagram was overtaken."""

NEW, EXACT, AT_LEAST = range(3)
"""Knowledge of the number that an exporter's next datagram has to bear."""
Mask = npt.NDArray[np.bool_]


@dataclass(slots=True)
class Parked:
    """A series that others have interrupted: its state, and the count for the jump away from it unless it continues.

    `jump` is the number of skipped numbers: more than `MAX_GAP`, or less than 0, is a restart; 0 counts as nothing.
    """

    next: int
    known: int
    uptime: int
    holes: list[Hole]
    jump: int
    seconds: int = 0


Explain = Callable[[int, list[Hole]], list[Hole]]
"""Returns the gaps of a slot that are missing for sure: others may have filled them."""


class SequenceTracker:
    """The numbers of up to `capacity` exporters, known by their slot: one array a fact, one row an exporter.

    `account` gets what was missed under `unit`. Numbers are counted on beyond 32 bits, so they never wrap here.
    """

    def __init__(
        self, capacity: int, account: Counter[str], unit: str, explain: Explain = lambda _slot, holes: holes
    ) -> None:
        self._explain = explain
        self._begun = np.zeros(capacity, np.int64)
        """The first number of the present series."""
        self.repeated: set[int] = set()
        """Slots in which a number has come again, for the caller to clear."""
        self._parked: dict[int, list[Parked]] = {}
        self._given_up: dict[int, list[Hole]] = {}
        """Gaps that nothing fills any more, kept until they are counted together: two slots may have filled each
        other's."""
        self._counted: set[int] = set()
        """Slots whose gaps that were just given up are counted already."""
        self._as_one: set[tuple[int, int]] = set()
        """Pairs of slots of which one was found to fill gaps of the other, meanwhile."""
        self._had: dict[int, list[tuple[int, int]]] = {}
        """By slot: the stretches of numbers that have come, from the first question until the missing are counted."""
        self.steps = 0
        """Steps that were taken to compare gaps since the last `settle`."""
        self._next = np.zeros(capacity, np.int64)
        self._known = np.zeros(capacity, np.int8)
        self._uptime = np.zeros(capacity, np.int64)
        self._holes: dict[int, list[Hole]] = {}
        self.fallen_back: Integers = np.zeros(0, np.int64)
        """Datagrams of the last call, by place, that are far behind, or of an exporter that was restarted."""
        self.missed: Counter[int] = Counter()
        """By slot: the part that its present exporter has of what was missed."""
        self._account = account
        self._unit = unit

    def track(
        self, slots: Integers, first: Mask, numbers: Integers, counts: Integers, uptime: Integers, sure: Mask
    ) -> None:
        """Note datagrams: of `slots` one after the other, each exporter's `first` one marked, in order.

        A datagram takes the number of numbers in `counts`; where it is not `sure`, it may take more.
        """
        before = np.concatenate(([0], numbers[:-1] + counts[:-1]))
        known = np.where(np.concatenate(([False], sure[:-1])), EXACT, AT_LEAST)
        up_before = np.concatenate(([0], uptime[:-1]))
        before[first], known[first], up_before[first] = self._next[slots], self._known[slots], self._uptime[slots]
        ahead = _signed(numbers - before)
        regular = (known == NEW) | (ahead == 0) | ((known == AT_LEAST) & (ahead > 0) & (ahead <= MAX_GAP))
        regular &= (known == NEW) | (_signed(uptime - up_before) >= -UPTIME_SLACK_MS)
        last = np.append(first[1:], True)
        self.fallen_back = np.flatnonzero(~regular)
        if len(self.fallen_back):
            behind = (ahead < -WINDOW) | (_signed(uptime - up_before) < -UPTIME_SLACK_MS)
            self.fallen_back = np.flatnonzero(~regular & behind)
            groups = np.cumsum(first) - 1
            odd = np.zeros(len(slots), bool)
            odd[groups[~regular]] = True
            odd_rows = odd[groups]
            # Behind an inexact row nothing is contiguous for sure, so a stretch ends there too.
            begins = first | ~regular | (known == AT_LEAST)
            starts = np.flatnonzero(odd_rows & begins).tolist()
            stops = (np.flatnonzero(odd_rows & np.append(begins[1:], True)) + 1).tolist()
            for start, stop in zip(starts, stops, strict=True):
                stretch = slice(start, stop)
                slot = int(slots[groups[start]])
                self._take(slot, numbers[stretch], counts[stretch], uptime[stretch], sure=bool(sure[stop - 1]))
            first, last, slots = first & ~odd_rows, last & ~odd_rows, slots[~odd]
        fresh = self._known[slots] == NEW
        self._begun[slots[fresh]] = numbers[first][fresh]
        begin = np.where(fresh, numbers[first], self._next[slots])
        self._next[slots] = begin + ((numbers[last] + counts[last] - begin) & 0xFFFFFFFF)
        self._known[slots] = np.where(sure[last], EXACT, AT_LEAST)
        self._uptime[slots] = uptime[last]
        self._count_missed()

    def _take(self, slot: int, numbers: Integers, counts: Integers, uptime: Integers, *, sure: bool) -> None:
        """Note a stretch of an exporter's datagrams, contiguous in number. Not `sure`: the last may take more."""
        ahead = nearest(numbers[0] - self._next[slot])
        if self._is_far(slot, ahead, int(counts[0])):
            ahead = self._change_series(slot, int(numbers[0]), int(uptime[0]))
        due, known = int(self._next[slot]), int(self._known[slot])
        if known != NEW and ahead < -WINDOW and len(numbers) > 1:  # each is late on its own, or begins anew
            for at in range(len(numbers)):
                one = slice(at, at + 1)
                self._take(slot, numbers[one], counts[one], uptime[one], sure=sure or at < len(numbers) - 1)
            return
        start = due + ahead
        stop = start + int((numbers[-1] + counts[-1] - numbers[0]) & 0xFFFFFFFF)
        if known != NEW and nearest(uptime[0] - self._uptime[slot]) < -UPTIME_SLACK_MS:
            self._account[EXPORTER_RESTARTS] += 1
            self._miss(slot, self._holes.pop(slot, []))
            known = NEW
        if known == EXACT and ahead > 0:
            self._keep(slot, [*self._holes.get(slot, ()), Hole(due, start)])
        elif known != NEW and ahead < 0:
            if not any(max(hole.start, start) < min(hole.stop, stop) for hole in self._holes.get(slot, ())):
                self.repeated.add(slot)
            self._fill(slot, start, stop if sure else due)
            late = np.count_nonzero(((numbers - numbers[0]) & 0xFFFFFFFF) < -ahead)
            self._account[EXPORTER_REORDERED] += int(late)
        last = start + int((numbers[-1] - numbers[0]) & 0xFFFFFFFF)
        if known == NEW:
            self._begun[slot] = start
        if known == NEW or stop > due or last >= due:
            self._next[slot], self._known[slot] = stop, EXACT if sure else AT_LEAST
            self._uptime[slot] = uptime[-1]

    def _is_far(self, slot: int, ahead: int, count: int) -> bool:
        """Return whether a datagram of `count` numbers, `ahead` of what is due, is of another series than the last."""
        known = self._known[slot]
        if known == NEW or -WINDOW <= ahead <= (WINDOW if known == EXACT else MAX_GAP):
            return False
        start = int(self._next[slot]) + ahead
        return not any(max(hole.start, start) < min(hole.stop, start + count) for hole in self._holes.get(slot, ()))

    def _change_series(self, slot: int, number: int, uptime: int) -> int:
        """Park the present series, for the one that a number is of, or a new one; return its distance from that.

        A series that does not continue counts when too many are parked, or when it has been parked for too long.
        """
        parked = self._parked.setdefault(slot, [])
        jump = nearest(number - self._next[slot])
        found = next((each for each in parked if _goes_on(each, number, uptime)), None)
        current = Parked(
            int(self._next[slot]),
            int(self._known[slot]),
            int(self._uptime[slot]),
            self._holes.pop(slot, []),
            0 if found else jump,
        )
        parked.append(current)
        if found is None:
            self._known[slot] = NEW
            for each in parked[: -MAX_PARKED or None]:
                self._end_series(slot, each)
            del parked[:-MAX_PARKED]
            return jump
        parked.remove(found)
        self._next[slot], self._known[slot], self._uptime[slot] = found.next, found.known, found.uptime
        self._begun[slot] = found.next
        if found.holes:
            self._holes[slot] = found.holes
        return nearest(number - found.next)

    def _end_series(self, slot: int, series: Parked, *, sure: bool = True) -> None:
        """Count the jump away from a series, as it has not continued; not `sure`: it still may."""
        self._miss(slot, series.holes)
        if not -WINDOW <= series.jump <= MAX_GAP:
            self._account[EXPORTER_RESTARTS] += 1
        elif series.jump > 0:
            if sure:
                self._count(slot, series.jump)
            else:
                self._account[EXPORTER_UNSURE] += 1

    def _count(self, slot: int, missed: int) -> None:
        self._account[self._unit] += missed
        self.missed[slot] += missed

    def _keep(self, slot: int, holes: list[Hole]) -> None:
        """Set the gaps of an exporter that may still be filled; the oldest beyond the limit are missed."""
        beyond = max(0, len(holes) - MAX_HOLES)
        self._miss(slot, holes[:beyond])
        if holes:
            self._holes[slot] = holes[beyond:]
        else:
            self._holes.pop(slot, None)

    def _fill(self, slot: int, start: int, stop: int) -> None:
        """Remove numbers that have come late from the gaps."""
        self._keep(slot, without(self._holes.get(slot, []), [(start, stop)] if start < stop else []))

    def _miss(self, slot: int, holes: list[Hole]) -> None:
        if holes:
            self._given_up.setdefault(slot, []).extend(holes)

    def _count_missed(self) -> None:
        for slot in sorted(self._given_up):
            missing = self._explain(slot, self._given_up[slot])
            self._count(slot, sum(hole.stop - hole.start for hole in missing))
            self._counted.add(slot)
        self._given_up, self._counted, self._as_one, self._had = {}, set(), set(), {}

    def settle(self, *, at_once: bool = False) -> None:
        """Count as missed what has not come since the last call but one, or all that has not come."""
        self.steps = 0
        for slot, holes in list(self._holes.items()):
            self._miss(slot, [hole for hole in holes if hole.old or at_once])
            self._keep(slot, [Hole(hole.start, hole.stop, True) for hole in holes if not (hole.old or at_once)])
        for slot, parked in list(self._parked.items()):
            for series in parked:
                self._miss(slot, series.holes)
                series.holes = []
                series.seconds += 1
                if series.seconds > PARKED_SECONDS or at_once:
                    self._end_series(slot, series, sure=not at_once)
            self._parked[slot] = [each for each in parked if each.seconds <= PARKED_SECONDS and not at_once]
            if not self._parked[slot]:
                del self._parked[slot]
        self._count_missed()

    def forget(self, slot: int) -> None:
        """Follow a slot's exporter anew, or another one from now on."""
        for series in self._parked.pop(slot, []):
            self._end_series(slot, series, sure=False)
        self._miss(slot, self._holes.pop(slot, []))
        self._count_missed()
        self._known[slot] = NEW

    def begin_anew(self, slot: int) -> int:
        """Follow a slot's exporter anew, with nothing counted; return the number of gaps it had."""
        gaps = len(self._holes.pop(slot, [])) + len(self._parked.pop(slot, []))
        self._known[slot] = NEW
        return gaps

    def is_due(self, slot: int, number: int, within: int, due: int | None = None) -> bool:
        """Return whether a number is within `within` of the next of a slot; the next may be given as `due`."""
        if due is None and self._known[slot] == NEW:
            return False
        expected = int(self._next[slot]) if due is None else due
        return -within <= nearest(number - expected) <= within

    def due(self, slot: int) -> int:
        """Return the number that a slot's exporter is to send next, as far as is known, modulo 2**32."""
        return int(self._next[slot]) & 0xFFFFFFFF

    def unfilled(self, slot: int, other: int, holes: list[Hole]) -> list[Hole]:
        """Return gaps of a slot less numbers that came by another slot: all of them unless both number as one.

        Two slots that have had the same number do not. A number that neither has had counts once.
        """
        shift = self._shift(other, int(self._next[slot]))
        low, high = int(self._begun[other]) + shift, int(self._next[other]) + shift
        left = holes
        self.steps += 1 + len(holes)
        if any(hole.start < high and low < hole.stop for hole in holes):
            mine, theirs = self._had_by(slot), moved(self._had_by(other), shift)
            apart = NEW in (self._known[slot], self._known[other]) or overlap(mine, theirs)
            left = holes if apart else without(holes, theirs)
            self.steps += len(mine) + len(theirs) + len(left)
        if left != holes:
            self._as_one |= {(slot, other), (other, slot)}
        if (slot, other) in self._as_one and other in self._counted:
            self.steps += len(self._given_up[other])
            left = without(left, [(hole.start + shift, hole.stop + shift) for hole in self._given_up[other]])
        return left

    def _had_by(self, slot: int) -> list[tuple[int, int]]:
        if slot not in self._had:
            self._had[slot] = self._received(slot)
            self.steps += len(self._had[slot])
        return self._had[slot]

    def merge(self, slot: int, other: int) -> None:
        """Follow both slots' exporters, which number as one, by the first from now on."""
        due = int(self._next[slot])
        shift = self._shift(other, due)
        mine, theirs = self._received(slot), moved(self._received(other), shift)
        lacked = [Hole(hole.start + shift, hole.stop + shift, hole.old) for hole in self._holes.pop(other, [])]
        own = without(self._holes.get(slot, []), theirs)
        # A number that both lack is in both lists.
        rest = without(without(lacked, mine), [(hole.start, hole.stop) for hole in own])
        if int(self._next[other]) + shift > due:
            self._next[slot], self._known[slot] = self._next[other] + shift, self._known[other]
            self._uptime[slot] = self._uptime[other]
        self._begun[slot] = min(int(self._begun[slot]), int(self._begun[other]) + shift)
        self._holes[slot] = sorted([*own, *rest], key=lambda hole: hole.start)  # a third may fill some: none goes yet
        self.forget(other)

    def _shift(self, slot: int, near: int) -> int:
        """Return the offset that brings a slot's numbers to the count in which `near` stands."""
        return near + nearest(self._next[slot] - near) - int(self._next[slot])

    def _received(self, slot: int) -> list[tuple[int, int]]:
        """Return the stretches of numbers that a slot has had, in order."""
        had = [Hole(int(self._begun[slot]), int(self._next[slot]))]
        gaps = [(hole.start, hole.stop) for held in (self._holes, self._given_up) for hole in held.get(slot, ())]
        return [(piece.start, piece.stop) for piece in without(had, gaps)]


def _goes_on(series: Parked, number: int, uptime: int) -> bool:
    """Return whether a number is of a series: near to what is due, by an exporter that was not restarted."""
    near = -WINDOW <= nearest(number - series.next) <= (WINDOW if series.known == EXACT else MAX_GAP)
    return near and nearest(uptime - series.uptime) >= -UPTIME_SLACK_MS


def _signed(numbers: Integers) -> Integers:
    """Return differences modulo 2**32 as the nearest way, from -2**31 on."""
    return ((numbers + 0x80000000) & 0xFFFFFFFF) - 0x80000000


def nearest(number: int | np.int64) -> int:
    """Return one difference modulo 2**32 in the same way."""
    return (int(number) + 0x80000000 & 0xFFFFFFFF) - 0x80000000
