"""Follows the flow exporters of a stream: which one sent a datagram, and what is missing from its numbers. No I/O.

Exporters are told apart by source address, by their own number for a part, and by port: several exporting processes may
be behind one address. Ports are joined only where one continues the numbers of another, or fills its gaps, and parted
when both bring the same number.
"""

import secrets
from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Final

import numpy as np
import numpy.typing as npt

from services.ingest.flows.ipfix_numbering import Numbering
from services.ingest.flows.ipfix_templates import TemplateTable
from services.ingest.flows.sequence_gaps import MAX_STEPS, WINDOW, Mask, SequenceTracker, nearest
from services.ingest.flows.sets import walk_sets
from services.ingest.flows.stretches import Hole
from services.ingest.flows.template_cache import Ready
from services.ingest.flows.template_reader import TemplateReader
from shared.datagrams.batch import DatagramBatch
from shared.datagrams.export_headers import KINDS, Headers, Integers, Kind, Words, read_heads
from shared.ledger.counters import EXPORTER_EVICTIONS, EXPORTER_UNSURE, EXPORTERS, NOT_FLOW
from shared.settings.entries import Protocol

MAX_EXPORTERS: Final = 16_384
"""Exporters followed at a time by a worker and stream: sources can be forged by the million. The longest silent goes
first."""
MAX_COMPARED: Final = 16
"""Exporters of one identity that a port is compared with."""
MAX_PORTS: Final = 64
"""Ports kept of those that number as one: some exporters take a port for each datagram."""
NEAR: Final = 64
"""Distance, ahead or behind, within which a number of a further port belongs to ports that number as one."""
KEY_WORDS: Final = 12
"""Words of 32 bits: identity, source address, port, and an unused one."""
ADDRESS: Final = slice(24, 40)
"""Bytes of a key that are the source address."""
IDENTITY_BYTES: Final = 24
"""Bytes of a key without the part that says where its datagrams come from."""


@dataclass(slots=True)
class Family:
    """Exporters of one identity: their slots, and whether two of them have turned out to number as one."""

    slots: dict[int, None] = field(default_factory=dict)
    joined: bool = False

    def last(self) -> list[int]:
        """Return the slots of the latest exporters: a sender that forges ports must not make all of them cost time."""
        return list(islice(reversed(self.slots), MAX_COMPARED))


class ExporterTracker:
    """Follows the exporters of one stream of a protocol, and counts in the stream's account.

    `capacity` is at least the number of rows of a batch.
    """

    def __init__(self, protocol: Protocol, account: Counter[str], capacity: int = MAX_EXPORTERS) -> None:
        self._kinds = [(kind, self._tracker(kind, account, capacity)) for kind in KINDS[protocol]]
        self._account = account
        self._capacity = capacity
        self._slots: OrderedDict[bytes, int] = OrderedDict()
        """By key, the one that was silent for longest first."""
        self._keys: dict[int, dict[bytes, None]] = {}
        """By slot: more than one where ports are joined."""
        self._free = list(range(capacity - 1, -1, -1))
        self._families: dict[bytes, Family] = {}
        self._identities: dict[int, bytes] = {}
        self._to_join: list[tuple[SequenceTracker, int, int]] = []
        self.templates = TemplateReader()
        self._lengths = TemplateTable() if protocol == "ipfix" else None
        self._numbering = Numbering(capacity) if protocol == "ipfix" else None
        self._factors = np.frombuffer(secrets.token_bytes(4 * KEY_WORDS), np.uint64) | np.uint64(1)

    def _tracker(self, kind: Kind, account: Counter[str], capacity: int) -> SequenceTracker:
        tracker = SequenceTracker(capacity, account, kind.unit, lambda slot, holes: self._explain(tracker, slot, holes))
        return tracker

    def observe(self, batch: DatagramBatch) -> None:
        """Note the datagrams of one receive call, in their order."""
        strangers = len(batch)
        heads = read_heads(batch)
        for kind, tracker in self._kinds:
            headers = kind.read(batch, heads)
            strangers -= len(headers.rows)
            if len(headers.rows):
                self._follow(batch, heads, headers, tracker, kind.header)
        if strangers:
            self._account[NOT_FLOW] += strangers

    def _follow(
        self, batch: DatagramBatch, heads: Words, headers: Headers, tracker: SequenceTracker, header: int
    ) -> None:
        order, first, slots = self._arrange(batch, headers, tracker)
        rows, counts, sure = headers.rows, headers.count, np.ones(len(order), bool)
        if header:
            buffer = np.frombuffer(batch.payload, np.uint8)
            sets = walk_sets(buffer, batch.offsets[rows], batch.lengths[rows], header)
            of_rows = np.empty(len(order), np.int64)
            of_rows[order] = slots[np.cumsum(first) - 1]
        if self._lengths is not None:
            counts, sure = self._lengths.count(buffer, sets, of_rows)
            self._account[EXPORTER_UNSURE] += int(np.count_nonzero(~sure))
        number, counts, sure = headers.number[order], counts[order], sure[order]
        if self._numbering is not None:
            number, counts, sure, anew = self._numbering.unify(slots, first, number, counts, sure)
            for slot in anew:
                tracker.forget(slot)
        tracker.track(slots, first, number, counts, headers.uptime[order], sure)
        if header:
            begun = {int(of_rows[row]): int(row) for row in order[tracker.fallen_back]}
            self.templates.read(batch, heads[rows], rows, sets, of_rows, begun)
        self._join()
        self._part(tracker)

    def kept_templates(self, now_ns: int) -> list[Ready]:
        """Return templates and options data of all exporters, as datagrams that each would send now."""
        return self.templates.cache.datagrams(now_ns, self._due)

    def number_aside_anew(self) -> None:
        """Let the numbers for those who get only templates go on where those of the exporters are now."""
        self.templates.cache.number_aside_anew(self._due)

    def _due(self, slot: int) -> int:
        """Return the number that an exporter with templates is to send next, as far as is known."""
        due = next(tracker.due(slot) for kind, tracker in self._kinds if kind.header)
        later = self._numbering.due(slot) if self._numbering else due
        return later if 0 < nearest(later - due) <= WINDOW else due

    def _arrange(
        self, batch: DatagramBatch, headers: Headers, tracker: SequenceTracker
    ) -> tuple[Integers, Mask, Integers]:
        """Bring rows of one exporter together, in their order.

        Return that order, a mask of the first row of each exporter in it, and the slot of each exporter.
        """
        keys = np.zeros((len(headers.rows), KEY_WORDS), np.uint32)
        keys[:, :6] = headers.keys
        keys[:, 6:10] = np.ascontiguousarray(batch.rows["address"][headers.rows]).view(np.uint32)
        keys[:, 10] = batch.rows["port"][headers.rows]
        # By a hash, which is sorted faster. A sender can't aim at a hash that two exporters share.
        order = np.argsort(keys.view(np.uint64) @ self._factors, kind="stable")
        arranged = keys.view(np.uint64)[order]
        first = np.ones(len(order), bool)
        first[1:] = (arranged[1:] != arranged[:-1]).any(axis=1)
        slots = self._slots_of(arranged[first], order, first, headers, tracker)
        if len({*slots.tolist()}) < len(slots):  # joined ports, whose rows are mixed
            of_rows = np.empty(len(order), np.int64)
            of_rows[order] = slots[np.cumsum(first) - 1]
            order = np.argsort(of_rows, kind="stable")
            by_slot = of_rows[order]
            first = np.append(True, by_slot[1:] != by_slot[:-1])
            slots = by_slot[first]
        return order, first, slots

    def _slots_of(
        self, keys: npt.NDArray[np.uint64], order: Integers, first: Mask, headers: Headers, tracker: SequenceTracker
    ) -> Integers:
        """Return the slot of each key; new keys get theirs in the order in which they came."""
        packed, size = keys.tobytes(), keys.shape[1] * keys.itemsize
        found = [packed[at : at + size] for at in range(0, len(packed), size)]
        slots = [self._slots.get(key, -1) for key in found]
        for key, slot in zip(found, slots, strict=True):
            if slot >= 0:
                self._slots.move_to_end(key)
        fresh = [group for group, slot in enumerate(slots) if slot < 0]
        if fresh:
            begins, ends = order[first], order[np.append(first[1:], True)]
            ended: dict[int, tuple[int, int]] = {}
            for group in sorted(fresh, key=lambda group: int(begins[group])):
                begin, end = int(begins[group]), int(ends[group])
                slots[group] = slot = self._new_key(found[group], int(headers.number[begin]), begin, tracker, ended)
                ended[slot] = end, int(headers.number[end] + headers.count[end])
        return np.array(slots)

    def _new_key(
        self, key: bytes, number: int, row: int, tracker: SequenceTracker, ended: Mapping[int, tuple[int, int]]
    ) -> int:
        """Give a new key, which comes with `row`, a slot: that of an exporter whose numbers it continues, or its own.

        `ended` has the new keys too: the last row of each, and the number that is due then.
        """
        if len(self._slots) == self._capacity:
            self._drop(next(iter(self._slots)))
        family = self._families.setdefault(key[:IDENTITY_BYTES], Family())
        # IPFIX numbers each transport session by itself (RFC 7011, 3.1), and has templates for each.
        within = NEAR if family.joined else 0
        slots = family.last() if self._lengths is None else ()
        others = (each for each in slots if ended.get(each, (-1, 0))[0] < row)
        slot = next((each for each in others if tracker.is_due(each, number, within, *ended.get(each, ())[1:])), None)
        if slot is None:
            return self._take_slot(key, family)
        family.joined = True
        if len(self._keys[slot]) == MAX_PORTS:
            self._drop(next(iter(self._keys[slot])))
        self._slots[key] = slot
        self._keys[slot][key] = None
        return slot

    def _take_slot(self, key: bytes, family: Family) -> int:
        """Give a key a slot of its own."""
        self._slots[key] = slot = self._free.pop()
        family.slots[slot] = None
        self._identities[slot] = key[:IDENTITY_BYTES]
        self._keys[slot] = {key: None}
        return slot

    def _drop(self, key: bytes) -> None:
        """Drop a key, and its exporter when it was the last key of that."""
        slot = self._slots.pop(key)
        del self._keys[slot][key]
        if not self._keys[slot]:
            self._account[EXPORTER_EVICTIONS] += 1
            self._release(slot)

    def _release(self, slot: int) -> None:
        """Free a slot for another exporter."""
        for _, tracker in self._kinds:
            tracker.forget(slot)
            tracker.missed.pop(slot, None)
        self.templates.forget(slot)
        if self._lengths is not None:
            self._lengths.forget(slot)
        if self._numbering is not None:
            self._numbering.forget(slot)
        identity = self._identities.pop(slot)
        del self._families[identity].slots[slot]
        if not self._families[identity].slots:
            del self._families[identity]
        del self._keys[slot]
        self._free.append(slot)

    def _explain(self, tracker: SequenceTracker, slot: int, holes: list[Hole]) -> list[Hole]:
        """Return the gaps that are missing for sure; where another port has filled some, both are joined soon."""
        for other in self._families[self._identities[slot]].last():
            if other == slot:
                continue
            if tracker.steps >= MAX_STEPS:
                self._account[EXPORTER_UNSURE] += len(holes)
                return []
            left = tracker.unfilled(slot, other, holes)
            if left != holes and self._lengths is None:
                self._to_join.append((tracker, slot, other))
            elif left != holes:
                self._account[EXPORTER_UNSURE] += 1
            holes = left
        return holes

    def _join(self) -> None:
        """Join slots that have filled each other's gaps; not before, as gaps are counted while slots are in use."""
        joined: dict[int, int] = {}
        while self._to_join:
            tracker, slot, other = self._to_join.pop()
            while slot in joined:
                slot = joined[slot]
            while other in joined:
                other = joined[other]
            if slot == other or slot not in self._keys or other not in self._keys:  # joined already, or gone
                continue
            joined[other] = slot
            tracker.merge(slot, other)
            tracker.missed[slot] += tracker.missed.pop(other, 0)
            for key in self._keys[other]:
                self._slots[key] = slot
                self._keys[slot][key] = None
            self._families[self._identities[slot]].joined = True
            self.templates.move(other, slot)
            self._release(other)

    def _part(self, tracker: SequenceTracker) -> None:
        """Part ports that were taken for one and have had the same number: losses until now are not known."""
        for slot in tracker.repeated:
            if len(self._keys.get(slot, ())) < 2:  # sent twice, or duplicated by the network
                continue
            self._account[EXPORTER_UNSURE] += tracker.begin_anew(slot)
            family = self._families[self._identities[slot]]
            family.joined = False
            for key in list(self._keys[slot])[1:]:
                del self._keys[slot][key]
                self._take_slot(key, family)
        tracker.repeated.clear()

    def missed(self) -> Counter[bytes]:
        """Return what was missed of each source address (16 bytes), as far as its exporters are followed now."""
        found: Counter[bytes] = Counter()
        for _, tracker in self._kinds:
            for slot, count in tracker.missed.items():
                if count and slot in self._keys:
                    found[next(iter(self._keys[slot]))[ADDRESS]] += count
        return found

    def settle(self, *, at_once: bool = False) -> None:
        """Count what is missing for good, and the number of exporters. Due every second; at the end `at_once`."""
        for _, tracker in self._kinds:
            tracker.settle(at_once=at_once)
        self._join()
        self._account[EXPORTERS] = len(self._keys)
