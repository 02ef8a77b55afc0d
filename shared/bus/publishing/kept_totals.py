"""Totals of what a worker has published of each stream, kept where its successor finds them, also after a kill.

A sender of copies that was away then learns from the successor how much there was, and counts what it did not get.
"""

import time
from pathlib import Path
from typing import Final

from shared.bus.kept_counts import KeptCounts, KeptFile
from shared.ledger.accounts import ENDED, Accounts
from shared.ledger.counters import NO_SUBSCRIBER, PUBLISHED, STARTED

MAX_ENDED: Final = 256
"""Accounts of streams of predecessors that are told: the newest."""
COUNTERS: Final = (PUBLISHED, NO_SUBSCRIBER, STARTED)


class KeptTotals:
    """The totals of this start of a worker, by stream, and those with which starts before it have ended."""

    def __init__(self) -> None:
        self._file = KeptFile(None)
        self._boot = 0
        self._started_ns = time.time_ns()
        self._tables: dict[str, KeptCounts] = {}

    def open(self, path: Path, boot: int) -> Accounts:
        """Take the file, for the start of a worker with this boot id; return the accounts of those before it.

        There is one for each stream of each start, named by `ENDED`, its boot id and the stream.
        """
        self._file, self._boot = KeptFile(path), boot
        sheet = self._file.open()
        had = [(name, counts) for name, counts in sheet.tables.items() if counts.keys() & {PUBLISHED, NO_SUBSCRIBER}]
        ended = dict(had[-MAX_ENDED:])
        self._tables = {name: self._file.new_counts(counts) for name, counts in ended.items()}
        return ended

    def of(self, stream: str) -> KeptCounts:
        """Return the totals of a stream, which are zero now; `keep` is due."""
        counts = self._file.new_counts({STARTED: self._started_ns})
        self._tables[f"{ENDED}{self._boot:x}/{stream}"] = counts
        return counts

    def keep(self) -> None:
        """Keep totals that have no place yet. Due every second, and with new streams."""
        self._file.renew()
        if self._file.stale:
            self._file.keep([], self._tables, {ENDED[:-1]: COUNTERS})

    def close(self) -> None:
        """Leave the totals to the successor."""
        self._file.close()
