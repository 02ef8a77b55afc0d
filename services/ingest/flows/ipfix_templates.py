"""Number of data records in an IPFIX datagram, as far as its exporter's templates tell (RFC 7011, 3.3 and 3.4).

It tells only what is certain. A datagram has *at least* the records counted where the template of a set has not come,
where a template changes in the same receive call, or where records vary in length.
"""

from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from services.ingest.flows.sets import FIRST_DATA, IPFIX, MAX_SETS, TEMPLATE_SETS, Sets, read_templates
from shared.datagrams.export_headers import Bytes, Integers

TEMPLATES, OPTIONS_TEMPLATES = TEMPLATE_SETS[IPFIX]
MAX_READ: Final = 16_384
"""Bytes of template sets read a receive call: they cost 40 µs a KiB. Sets that are known are only recognized."""
MAX_LOOKS: Final = 2
"""Template sets a datagram, on average, that are compared with the known ones."""
MAX_TEMPLATES: Final = 64
"""Templates kept an exporter."""
MAX_SEEN: Final = 64
"""Template sets of an exporter that are recognized when they come again."""


@dataclass(slots=True)
class _Known:
    """Lengths of an exporter's records by template, 0 where they vary; and hashes of the sets that gave them."""

    lengths: dict[int, int] = field(default_factory=dict)
    seen: set[int] = field(default_factory=set)


class TemplateTable:
    """The templates of every exporter, by slot."""

    def __init__(self) -> None:
        self._known: dict[int, _Known] = {}

    def forget(self, slot: int) -> None:
        """Free a slot for another exporter."""
        self._known.pop(slot, None)

    def count(self, buffer: Bytes, sets: Sets, slots: Integers) -> tuple[Integers, npt.NDArray[np.bool_]]:
        """Return the number of data records of each datagram, and whether that is all; learn its templates."""
        sure = sets.whole.copy()
        changed = self._learn(buffer, sets, slots)
        data = np.flatnonzero(sets.id >= FIRST_DATA)
        owner, size = sets.owner[data], (sets.stop - sets.start)[data]
        which, inverse = np.unique(slots[owner] << 16 | sets.id[data], return_inverse=True)
        lengths = np.array([0 if key in changed else self._length(key) for key in which.tolist()], np.int64)[inverse]
        counts = np.zeros(len(slots), np.int64)
        np.add.at(counts, owner, size // np.maximum(lengths, 1) * (lengths > 0))
        sure[owner[lengths == 0]] = False
        return counts, sure

    def _length(self, key: int) -> int:
        known = self._known.get(key >> 16)
        return known.lengths.get(key & 0xFFFF, 0) if known else 0

    def _learn(self, buffer: Bytes, sets: Sets, slots: Integers) -> set[int]:
        """Read template sets that are new; return (slot, template) of those that have changed."""
        changed: set[int] = set()
        found = np.flatnonzero((sets.id == TEMPLATES) | (sets.id == OPTIONS_TEMPLATES))
        looks, budget = MAX_LOOKS * len(slots) + MAX_SETS, MAX_READ
        unread = found[looks:].tolist()
        for at in found[:looks].tolist():
            kind, content = int(sets.id[at]), buffer[sets.start[at] : sets.stop[at]].tobytes()
            known = self._known.get(int(slots[sets.owner[at]]))
            if known and hash((kind, content)) in known.seen:
                continue
            if len(content) > budget:
                unread.append(at)
                continue
            budget -= len(content)
            changed |= self._read(int(slots[sets.owner[at]]), content, kind)
        for slot in {*slots[sets.owner[unread]].tolist()}:  # an unread set may contradict what is known
            known = self._known.pop(slot, _Known())
            changed |= {slot << 16 | template for template in known.lengths}
        return changed

    def _read(self, slot: int, content: bytes, kind: int) -> set[int]:
        known = self._known.setdefault(slot, _Known())
        changed = set()
        for each in read_templates(content, options=kind == OPTIONS_TEMPLATES):
            template, length = each.id, each.record_length
            if known.lengths.get(template, length) != length:
                changed.add(slot << 16 | template)
                known.seen.clear()
            if template in known.lengths or len(known.lengths) < MAX_TEMPLATES:
                known.lengths[template] = length
        if len(known.seen) < MAX_SEEN:
            known.seen.add(hash((kind, content)))
        return changed
