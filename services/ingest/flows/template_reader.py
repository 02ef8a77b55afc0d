"""Finds templates and options data in the datagrams of a receive call, and keeps them. No I/O.

Rows are found by columns. Only those that define something are looked at one by one, and only what is new is parsed.
"""

import heapq
from collections.abc import Mapping
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from services.ingest.flows.sets import IPFIX, SET_HEADER, TEMPLATE_SETS, V9, Sets
from services.ingest.flows.template_cache import DefiningDatagram, Ready, TemplateCache
from shared.datagrams.batch import DatagramBatch
from shared.datagrams.export_headers import Integers, Words

MAX_READ: Final = 1 << 20
READ_PER_SECOND: Final = 512 << 10
"""Bytes that may be read at once, and on average: they cost 60 µs a KiB. An exporter that sends more is forgotten. What
comes again is only recognized. Hundreds of exporters may begin at the same time."""
DATAGRAM_COST: Final = 2 << 10
"""Bytes of that for each datagram, however short it is."""
KEY_COST: Final = 32
"""Bytes of that for each key."""
MAX_RENEWALS: Final = 4096
"""Renewals kept until they are taken."""
_FACTS: Final = {V9: (1, 2, 3, 4), IPFIX: (1, 1, 2, 3)}
"""Words of a header by version: uptime (IPFIX has none), seconds, number, domain."""


class TemplateReader:
    """Reads what a stream's exporters define into its cache.

    While it is `renewing`, `renewals` has what has come, changed or not, until it is taken.
    """

    def __init__(self) -> None:
        self.cache = TemplateCache()
        self.renewing = False
        self.renewals: list[Ready] = []
        self._budget, self._budget_ns = MAX_READ, 0
        """Bytes that may be read, as of a time."""
        self._options: Integers | None = np.zeros(0, np.int64)
        """The data sets that are options data, in order; None: find out again."""

    def forget(self, slot: int) -> None:
        """Drop what is kept of an exporter."""
        if self.cache.options_of(slot):
            self._options = None
        self.cache.forget(slot)

    def move(self, slot: int, to: int) -> None:
        """Keep an exporter under another slot, unless something is kept there already."""
        self.cache.move(slot, to)
        self._options = None

    def read(
        self, batch: DatagramBatch, words: Words, rows: Integers, sets: Sets, slots: Integers, begun: Mapping[int, int]
    ) -> None:
        """Read datagrams of one version: these rows of a batch, and the first words, sets and exporters' slots of each.

        `begun` has the exporters that began anew, by slot: the datagram with which they did.
        """
        for slot in begun:
            self.forget(slot)
        version = int(words[0, 0] >> 16)
        keys, (plain, options) = slots[sets.owner] << 16 | sets.id, TEMPLATE_SETS[version]
        defining = (sets.id == plain) | (sets.id == options) | self._are_options(keys)
        if not defining.any():
            return
        self._refill(batch.received_ns)
        if self._budget <= 0:
            strangers = [slot for slot in {*slots[sets.owner[defining]].tolist()} if slot not in self.cache]
            for slot in strangers:
                self.forget(slot)
            defining &= ~np.isin(slots, strangers)[sets.owner]
        call = _Call(batch, words, rows, sets, version)
        waiting = call.pick(defining)  # in order, which a heap may be
        queued, skipped = {each.owner for each in waiting}, set[int]()
        while waiting:
            picked = heapq.heappop(waiting)
            slot = int(slots[picked.owner])
            if slot in skipped or picked.owner < begun.get(slot, 0):
                continue
            piece = self.cache.recognize(slot, picked.arrived)
            if piece is None and self._budget <= 0:
                skipped.add(slot)
                self.forget(slot)
                continue
            if piece is None:
                known = self.cache.options_of(slot)
                piece = self.cache.learn(slot, call.with_all_sets(picked))
                self._budget -= DATAGRAM_COST + sum(map(len, picked.arrived.sets))
                self._budget -= len(piece.body) + KEY_COST * piece.keys if piece else 0
                if self.cache.options_of(slot) != known:
                    self._options = None
                    fresh = np.isin(keys, [slot << 16 | id for id in self.cache.options_of(slot) - known])
                    fresh &= sets.owner > picked.owner  # options data right behind its template
                    for later in call.pick(fresh):
                        if later.owner not in queued:
                            queued.add(later.owner)
                            heapq.heappush(waiting, later)
            if piece is not None and self.renewing and len(self.renewals) < MAX_RENEWALS:
                self.renewals.append(self.cache.renewal(slot, piece, picked.arrived))

    def _refill(self, now_ns: int) -> None:
        passed = max(0, now_ns - self._budget_ns)
        self._budget = min(MAX_READ, self._budget + passed * READ_PER_SECOND // 10**9)
        self._budget_ns = now_ns

    def _are_options(self, keys: Integers) -> npt.NDArray[np.bool_]:
        if self._options is None:
            self._options = np.array(sorted(self.cache.options), np.int64)
        if not len(self._options):
            return np.zeros(len(keys), bool)
        at = np.minimum(np.searchsorted(self._options, keys), len(self._options) - 1)
        found: npt.NDArray[np.bool_] = self._options[at] == keys
        return found


class _Picked(NamedTuple):
    """A datagram that defines something, with the sets by which it was picked."""

    owner: int
    arrived: DefiningDatagram


class _Call:
    """The datagrams of a receive call, from which some are picked."""

    def __init__(self, batch: DatagramBatch, words: Words, rows: Integers, sets: Sets, version: int) -> None:
        self._batch, self._words, self._rows, self._sets, self._version = batch, words, rows, sets, version
        self._payload = memoryview(batch.payload)

    def pick(self, chosen: npt.NDArray[np.bool_]) -> list[_Picked]:
        """Return the datagrams that have any of the chosen sets, in order, with these alone."""
        sets, found = self._sets, np.flatnonzero(chosen)
        found = found[np.argsort(sets.owner[found], kind="stable")]
        owners, firsts, numbers = np.unique(sets.owner[found], return_index=True, return_counts=True)
        all_sets = np.bincount(sets.owner, minlength=len(self._rows))[owners]
        whole = (sets.whole[owners] & (numbers == all_sets)).tolist()
        starts, stops = (sets.start[found] - SET_HEADER).tolist(), sets.stop[found].tolist()
        sources = self._batch.rows[self._rows[owners]]
        addresses, ports = sources["address"].tobytes(), sources["port"].tolist()
        version, received_ns, payload = self._version, self._batch.received_ns, self._payload
        uptime, seconds, number, domain = _FACTS[version]
        picked = []
        for at, (owner, first, count, words) in enumerate(
            zip(owners.tolist(), firsts.tolist(), numbers.tolist(), self._words[owners].tolist(), strict=True)
        ):
            some = [bytes(payload[starts[one] : stops[one]]) for one in range(first, first + count)]
            picked.append(
                _Picked(
                    owner,
                    DefiningDatagram(
                        version, addresses[16 * at : 16 * at + 16], ports[at], words[domain], words[number],
                        words[seconds], words[uptime], words[0] & 0xFFFF, received_ns, some, whole[at],
                    ),
                )
            )  # fmt: skip
        return picked

    def with_all_sets(self, picked: _Picked) -> DefiningDatagram:
        """Return a picked datagram with all of its sets."""
        ((_, arrived),) = self.pick(self._sets.owner == picked.owner)
        return arrived
