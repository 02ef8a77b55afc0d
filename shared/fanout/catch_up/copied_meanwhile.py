"""Rows that came live while a collector catches up, and that rules have copied for it already. No I/O.

The journal keeps no generations. So what the rules have made of a row is noted when it comes live, for as long as the
collector catches up, and left out when the row comes from the journal or from the window.
"""

from collections import Counter
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from shared.bus.bodies.offload_messages import KernelServed
from shared.bus.continuity import Worker
from shared.datagrams.batch import DatagramBatch
from shared.datagrams.gathered import Mask
from shared.datagrams.routing import Router, Selection
from shared.datagrams.sampling import find_buckets, find_share, sample_rows
from shared.fanout.catch_up.window import Numbered

OWED, COPIED, PASSED_OVER, UNPLANNED_ROW = range(4)
"""The outcome of a row: it is left to us; or rules have copied it, passed it over in a sample, or nobody knows."""
Outcomes = npt.NDArray[np.uint8]
Entries = Mapping[int, KernelServed | None]
"""By generation: the entry by which the rules copy to a collector; None: nobody has told of the generation."""


class CopiedMeanwhile:
    """The outcomes of one collector's rows, by worker and running count."""

    def __init__(self) -> None:
        self._noted: dict[Worker, list[tuple[int, Outcomes]]] = {}
        self._matched: Counter[int] = Counter()
        """By generation: the rows that an entry with sampling has matched."""

    def note(self, live: Numbered, entries: Entries) -> None:
        """Note a live batch, some of whose datagrams were for these entries."""
        batch = live.batch
        assert batch.generations is not None
        outcomes = np.zeros(len(batch), np.uint8)
        for generation, entry in entries.items():
            rows = batch.generations == generation
            if entry is None:
                outcomes[rows] = UNPLANNED_ROW
                continue
            matched = np.flatnonzero(rows & _passing(entry, batch))
            outcomes[matched] = PASSED_OVER
            outcomes[sample_rows(matched, entry.client.sample, self._matched[generation])] = COPIED
            self._matched[generation] += len(matched)
        if outcomes.any():
            self._noted.setdefault(live.worker, []).append((live.total, outcomes))

    def outcomes(self, worker: Worker, start: int, stop: int) -> Outcomes | None:
        """Return the outcomes of a worker's rows from one running count up to another; None: all are owed."""
        found: Outcomes | None = None
        for total, outcomes in self._noted.get(worker, ()):
            first, last = max(start, total), min(stop, total + len(outcomes))
            if first < last:
                found = np.zeros(stop - start, np.uint8) if found is None else found
                found[first - start : last - start] = outcomes[first - total : last - total]
        return found


def _passing(entry: KernelServed, batch: DatagramBatch) -> Mask:
    router = Router()
    router.replace([entry.client])
    ((_, rows, _),) = router.takers(batch, [entry.client.name])
    return rows & find_share(entry.share, find_buckets(batch)) if entry.share else rows


def leave_out(outcomes: Outcomes, rows: Mask) -> tuple[Mask, Selection]:
    """Return which of these rows are owed, and what became of the others."""
    counts = np.bincount(outcomes[rows], minlength=UNPLANNED_ROW + 1).tolist()
    left = Selection(None, sampled_out=counts[PASSED_OVER], by_kernel=counts[COPIED], unplanned=counts[UNPLANNED_ROW])
    return rows & (outcomes == OWED), left
