"""What was lost before it came to us: exporters number what they send, and a gap in that is missing. No I/O.

Columns of a receive call go in, counters come out; no datagram is changed, dropped or delayed. `SequenceTracker` holds
what every exporter gave last as arrays, and looks at one exporter by itself only where something is out of order.

Gaps count as missed a second or two later: what was only overtaken fills them until then. An exporter that falls back
far, or says it has been up for less long than before, begins anew. Exporters are told apart by source address and what
they call their parts, not by port: those that number the same part from several ports need one worker.
"""

import secrets
from collections import Counter, OrderedDict
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from services.ingest.flow_headers import KINDS, Headers, Integers, Words, read_heads
from services.ingest.ipfix_numbering import Numbering
from services.ingest.ipfix_templates import Templates
from shared.datagrams.batch import DatagramBatch
from shared.ledger import (
    EXPORTER_EVICTIONS,
    EXPORTER_REORDERED,
    EXPORTER_RESTARTS,
    EXPORTER_UNSURE,
    EXPORTERS,
    NOT_FLOW,
)
from shared.settings.model import Protocol

MAX_EXPORTERS: Final = 16_384
"""Followed at a time by a worker and stream: sources can be forged by the million. The longest silent goes first."""
MAX_HOLES: Final = 8
"""Gaps of one exporter that may still be filled by what was overtaken."""
MAX_GAP: Final = 1 << 24
"""Numbers: who skips more than that has begun anew, as has who falls back by more than `WINDOW`."""
WINDOW: Final = 1024
"""Numbers that a datagram may be behind and be taken for late or repeated, where it fills no gap."""
UPTIME_SLACK_MS: Final = 10_000
"""An exporter that says it has been up for so much less than before was restarted; less is what was overtaken."""

NEW, EXACT, AT_LEAST = range(3)
"""What is known of the number an exporter's next datagram has to bear."""
Mask = npt.NDArray[np.bool_]


@dataclass(slots=True)
class Hole:
    """Numbers from `start` to before `stop` that have not come; `old` once a `settle` has seen it."""

    start: int
    stop: int
    old: bool = False


class SequenceTracker:
    """The numbers of up to `capacity` exporters, which are known by their slot: an array a fact, a row an exporter.

    `account` gets what was missed under `unit`. Numbers are counted on beyond 32 bits, so they never wrap here.
    """

    def __init__(self, capacity: int, account: Counter[str], unit: str) -> None:
        self._next = np.zeros(capacity, np.int64)
        self._known = np.zeros(capacity, np.int8)
        self._uptime = np.zeros(capacity, np.int64)
        self._holes: dict[int, list[Hole]] = {}
        self._account = account
        self._unit = unit

    def track(
        self, slots: Integers, first: Mask, numbers: Integers, counts: Integers, uptime: Integers, sure: Mask
    ) -> None:
        """Take note of datagrams: of `slots` one after the other, each exporter's `first` one marked, in order.

        A datagram takes as many numbers as `counts` says; where it is not `sure`, it may take more.
        """
        before = np.concatenate(([0], numbers[:-1] + counts[:-1]))
        known = np.where(np.concatenate(([False], sure[:-1])), EXACT, AT_LEAST)
        up_before = np.concatenate(([0], uptime[:-1]))
        before[first], known[first], up_before[first] = self._next[slots], self._known[slots], self._uptime[slots]
        ahead = _signed(numbers - before)
        regular = (known == NEW) | (ahead == 0) | ((known == AT_LEAST) & (ahead > 0) & (ahead <= MAX_GAP))
        regular &= (known == NEW) | (_signed(uptime - up_before) >= -UPTIME_SLACK_MS)
        last = np.append(first[1:], True)
        if not regular.all():
            groups = np.cumsum(first) - 1
            odd = np.zeros(len(slots), bool)
            odd[groups[~regular]] = True
            odd_rows = odd[groups]
            # Behind an inexact row nothing is contiguous for sure, so there a stretch ends too.
            begins = first | ~regular | (known == AT_LEAST)
            starts = np.flatnonzero(odd_rows & begins).tolist()
            stops = (np.flatnonzero(odd_rows & np.append(begins[1:], True)) + 1).tolist()
            for start, stop in zip(starts, stops, strict=True):
                stretch = slice(start, stop)
                slot = int(slots[groups[start]])
                self._take(slot, numbers[stretch], counts[stretch], uptime[stretch], sure=bool(sure[stop - 1]))
            first, last, slots = first & ~odd_rows, last & ~odd_rows, slots[~odd]
        begin = np.where(self._known[slots] == NEW, numbers[first], self._next[slots])
        self._next[slots] = begin + ((numbers[last] + counts[last] - begin) & 0xFFFFFFFF)
        self._known[slots] = np.where(sure[last], EXACT, AT_LEAST)
        self._uptime[slots] = uptime[last]

    def _take(self, slot: int, numbers: Integers, counts: Integers, uptime: Integers, *, sure: bool) -> None:
        """Take note of a stretch of an exporter's datagrams, contiguous in number. Not `sure`: the last takes more."""
        due, known = int(self._next[slot]), int(self._known[slot])
        ahead = int(_signed(numbers[0] - due))
        if known != NEW and ahead < -WINDOW and len(numbers) > 1:  # each is late on its own, or begins anew
            for at in range(len(numbers)):
                one = slice(at, at + 1)
                self._take(slot, numbers[one], counts[one], uptime[one], sure=sure or at < len(numbers) - 1)
            return
        start = due + ahead
        stop = start + int((numbers[-1] + counts[-1] - numbers[0]) & 0xFFFFFFFF)
        if known != NEW and self._begins_anew(slot, ahead, start + int(counts[0]), int(uptime[0])):
            self._account[EXPORTER_RESTARTS] += 1
            self.forget(slot)
            known = NEW
        if known == EXACT and ahead > 0:
            self._keep(slot, [*self._holes.get(slot, ()), Hole(due, start)])
        elif known != NEW and ahead < 0:
            self._fill(slot, start, stop if sure else due)
            late = np.count_nonzero(((numbers - numbers[0]) & 0xFFFFFFFF) < -ahead)
            self._account[EXPORTER_REORDERED] += int(late)
        last = start + int((numbers[-1] - numbers[0]) & 0xFFFFFFFF)
        if known == NEW or stop > due or last >= due:
            self._next[slot], self._known[slot] = stop, EXACT if sure else AT_LEAST
            self._uptime[slot] = uptime[-1]

    def _begins_anew(self, slot: int, ahead: int, stop: int, uptime: int) -> bool:
        """Whether an exporter's datagram, `ahead` of what is due and taking numbers to `stop`, follows a restart."""
        if int(_signed(uptime - self._uptime[slot])) < -UPTIME_SLACK_MS or ahead > MAX_GAP:
            return True
        start = int(self._next[slot]) + ahead
        return ahead < -WINDOW and not any(
            max(hole.start, start) < min(hole.stop, stop) for hole in self._holes.get(slot, ())
        )

    def _keep(self, slot: int, holes: list[Hole]) -> None:
        """These are the gaps of an exporter that may still be filled; the oldest beyond the bound are missed."""
        beyond = max(0, len(holes) - MAX_HOLES)
        self._miss(holes[:beyond])
        if holes:
            self._holes[slot] = holes[beyond:]
        else:
            self._holes.pop(slot, None)

    def _fill(self, slot: int, start: int, stop: int) -> None:
        """Take numbers that have come late out of the gaps."""
        left = []
        for hole in self._holes.get(slot, ()):
            low, high = max(hole.start, start), min(hole.stop, stop)
            rest = [(hole.start, low), (high, hole.stop)] if low < high else [(hole.start, hole.stop)]
            left += [Hole(*each, hole.old) for each in rest if each[0] < each[1]]
        self._keep(slot, left)

    def _miss(self, holes: list[Hole]) -> None:
        self._account[self._unit] += sum(hole.stop - hole.start for hole in holes)

    def settle(self, *, at_once: bool = False) -> None:
        """Count as missed what has not come since the last call but one, or all that has not come."""
        for slot, holes in list(self._holes.items()):
            self._miss([hole for hole in holes if hole.old or at_once])
            self._keep(slot, [Hole(hole.start, hole.stop, True) for hole in holes if not (hole.old or at_once)])

    def forget(self, slot: int) -> None:
        """Follow a slot's exporter anew, or another one from now on."""
        self._miss(self._holes.pop(slot, []))
        self._known[slot] = NEW


class ExporterTracker:
    """Follows the exporters of one stream of a protocol, and counts in the stream's account.

    `capacity` is at least the number of rows of a batch.
    """

    def __init__(self, protocol: Protocol, account: Counter[str], capacity: int = MAX_EXPORTERS) -> None:
        self._kinds = [(kind.read, SequenceTracker(capacity, account, kind.unit)) for kind in KINDS[protocol]]
        self._account = account
        self._capacity = capacity
        self._slots: OrderedDict[bytes, int] = OrderedDict()
        self._templates = Templates() if protocol == "ipfix" else None
        self._numbering = Numbering(capacity) if protocol == "ipfix" else None
        self._factors = np.frombuffer(secrets.token_bytes(48), np.uint64) | np.uint64(1)

    def observe(self, batch: DatagramBatch) -> None:
        """Take note of what came by one receive call, in its order."""
        strangers = len(batch)
        heads = read_heads(batch)
        for read, numbers in self._kinds:
            headers = read(batch, heads)
            strangers -= len(headers.rows)
            if len(headers.rows):
                self._follow(batch, headers, numbers)
        if strangers:
            self._account[NOT_FLOW] += strangers

    def _follow(self, batch: DatagramBatch, headers: Headers, numbers: SequenceTracker) -> None:
        order, first = self._arrange(headers.keys)
        slots = np.array(self._slots_of(headers.keys[order[first]]))
        counts, sure = headers.count, np.ones(len(order), bool)
        if self._templates is not None:
            of_rows = np.empty(len(order), np.int64)
            of_rows[order] = slots[np.cumsum(first) - 1]
            counts, sure = self._templates.count(batch, headers.rows, of_rows)
            self._account[EXPORTER_UNSURE] += int(np.count_nonzero(~sure))
        number, counts, sure = headers.number[order], counts[order], sure[order]
        if self._numbering is not None:
            number, counts, sure, anew = self._numbering.unify(slots, first, number, counts, sure)
            for slot in anew:
                numbers.forget(slot)
        numbers.track(slots, first, number, counts, headers.uptime[order], sure)

    def _arrange(self, keys: Words) -> tuple[Integers, Mask]:
        """Bring rows of one exporter together, in the order they have; return it, and where each exporter begins."""
        # By a hash, which is sorted faster. Nobody can aim at one that two exporters have.
        order = np.argsort(keys.astype(np.uint64) @ self._factors, kind="stable")
        arranged = keys[order]
        first = np.ones(len(order), bool)
        first[1:] = (arranged[1:] != arranged[:-1]).any(axis=1)
        return order, first

    def _slots_of(self, keys: Words) -> list[int]:
        found, size = keys.tobytes(), keys.shape[1] * keys.itemsize
        return [self._slot(found[at : at + size]) for at in range(0, len(found), size)]

    def _slot(self, key: bytes) -> int:
        slot = self._slots.get(key)
        if slot is not None:
            self._slots.move_to_end(key)
            return slot
        slot = len(self._slots)
        if slot == self._capacity:
            _, slot = self._slots.popitem(last=False)
            self._account[EXPORTER_EVICTIONS] += 1
            for _, numbers in self._kinds:
                numbers.forget(slot)
            if self._templates is not None:
                self._templates.forget(slot)
            if self._numbering is not None:
                self._numbering.forget(slot)
        self._slots[key] = slot
        return slot

    def settle(self, *, at_once: bool = False) -> None:
        """Count what is missing for good, and how many exporters there are. Due every second; at the end `at_once`."""
        for _, numbers in self._kinds:
            numbers.settle(at_once=at_once)
        self._account[EXPORTERS] = len(self._slots)


def _signed(numbers: Integers) -> Integers:
    """Differences modulo 2**32 as the nearest way, from -2**31 on."""
    return ((numbers + 0x80000000) & 0xFFFFFFFF) - 0x80000000
