"""The latest live batches of one stream, kept while a collector catches up on it: from them it goes on to live copies.

A batch stays until it is old and the journal is known to have it. What a killed journal has missed stays until all that
catch up have it. Pure: it decides and keeps, and reads nothing but its clock.
"""

import time
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Final, NamedTuple

from shared.bus.continuity import MAX_POSITIONS, Worker
from shared.datagrams.batch import DatagramBatch

SECONDS: Final = 2.0
"""Time for which a batch is kept at least: longer than the journal takes to have it and to be asked for it."""
MOST_BYTES: Final = 96 << 20
"""Bytes kept of a stream at most; the oldest batches go first, whether or not the journal has them."""
OVERHEAD: Final = 1024
"""Bytes that a batch takes beyond its columns and payloads, about."""


class Numbered(NamedTuple):
    """A batch with its place in what its worker has published on the stream: `total` datagrams came before it."""

    worker: Worker
    sequence: int
    total: int
    batch: DatagramBatch

    @property
    def end(self) -> int:
        """The worker's count behind it."""
        return self.total + len(self.batch)

    @property
    def size(self) -> int:
        """Bytes that it takes, about."""
        return OVERHEAD + 20 * len(self.batch) + len(self.batch.payload)

    def cut(self, count: int) -> tuple["Numbered", "Numbered"]:
        """Return what is before a count of its worker, and what is behind."""
        row = count - self.total
        before, behind = self.batch.part(0, row), self.batch.part(row, len(self.batch))
        return self._replace(batch=before), self._replace(total=count, batch=behind)


@dataclass(slots=True)
class _Run:
    """The kept batches of one worker, in order; from `whole_from` on none is missing between them."""

    whole_from: int
    end: int
    confirmed: int = 0
    """The journal is known to have everything before."""
    batches: deque[Numbered] = field(default_factory=deque)
    patch: list[Numbered] = field(default_factory=list)
    """Older batches that the journal may lack."""


class Window:
    """The kept batches of a stream: in the order in which they came, numbered from `first` up to `stop`.

    With `journaled` a batch stays until the journal is known to have it, else only until it is old.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        most_bytes: int = MOST_BYTES,
        *,
        journaled: bool = True,
    ) -> None:
        self.first = self.stop = 0
        self.size = 0
        self.let_go: Counter[Worker] = Counter()
        """By worker: its datagrams that were received since this window is there, and are not kept any more."""
        self._began_ns = time.time_ns()
        self._clock = clock
        self.seconds = SECONDS
        self._most_bytes = most_bytes
        self.journaled = journaled
        self._order: deque[tuple[float, Numbered]] = deque()
        self._runs: dict[Worker, _Run] = {}
        self._journal_boot: Hashable = None
        self._opening: dict[Worker, int] = {}
        """The counts that the journal told of first since it was started."""
        self._suspect: dict[Worker, tuple[int, int]] = {}
        """By worker: the range of its count that the journal may lack, since it was restarted."""
        self._open: set[Worker] = set()
        """Workers of which the journal has told only that count: what it took first comes behind."""
        self.heads: dict[Worker, int] = {}
        """The counts that the journal told of last, also of workers of which nothing came."""

    def add(self, numbered: Numbered) -> None:
        """Keep a batch that has just come; those of a worker come in the order of its count."""
        run = self._runs.get(numbered.worker)
        if run is None:
            run = self._runs[numbered.worker] = _Run(numbered.total, numbered.total)
        if run.end != numbered.total:
            run.whole_from = numbered.total
        run.end = numbered.end
        run.batches.append(numbered)
        self._order.append((self._clock(), numbered))
        self.stop += 1
        self.size += numbered.size
        self.trim()

    def confirm(self, boot: Hashable, reached: Mapping[Worker, int]) -> None:
        """Note what the journal has reached of each worker; `boot` is another one once it was started anew.

        A journal that was restarted, or could not write, may lack datagrams: those from its last report before that up
        to the first one that it took afterwards. The latter is at most the count of its first report that has grown.
        """
        if boot != self._journal_boot:
            self._journal_boot, self._opening = boot, {}
        self.heads.update(reached)
        while len(self.heads) > MAX_POSITIONS:  # those known longest go, and come again if they live
            del self.heads[next(iter(self.heads))]
        for worker, count in reached.items():
            run = self._runs.get(worker)
            confirmed = run.confirmed if run else 0
            opening = self._opening.setdefault(worker, count)
            if worker in self._open or count == opening:
                begin, end = self._suspect.get(worker, (confirmed, count))
                self._suspect[worker] = min(begin, confirmed), max(end, count)
                (self._open.add if count == opening else self._open.discard)(worker)
            if run:
                run.confirmed = max(confirmed, count)
        self.trim()

    def trim(self, most_bytes: int = MOST_BYTES) -> None:
        """Let go of what is old, if the journal has it, and of what is too much."""
        now, most = self._clock(), min(most_bytes, self._most_bytes)
        while self._order:
            self._trim_patches(most)
            since, numbered = self._order[0]
            run = self._runs[numbered.worker]
            old = since + self.seconds <= now and (numbered.end <= run.confirmed or not self.journaled)
            if not old and self.size <= most:
                break
            self._order.popleft()
            self.first += 1
            run.batches.popleft()
            if numbered.batch.received_ns >= self._began_ns:
                self._note_let_go(numbered)
            begin, end = self._suspect.get(numbered.worker, (0, 0))
            if old and numbered.end > begin and numbered.total < end:
                run.patch.append(numbered)
            else:
                self.size -= numbered.size
            run.whole_from = max(run.whole_from, numbered.end)
        self._trim_patches(most)

    def _note_let_go(self, numbered: Numbered) -> None:
        self.let_go[numbered.worker] += len(numbered.batch)
        if len(self.let_go) > MAX_POSITIONS:
            del self.let_go[next(iter(self.let_go))]

    def _trim_patches(self, most: int) -> None:
        """Of too much, let go of the oldest that the journal may lack first: nobody gets level without the latest."""
        while self.size > most and (some := [run for run in self._runs.values() if run.patch]):
            oldest = min(some, key=lambda run: run.patch[0].batch.received_ns)
            self.size -= oldest.patch.pop(0).size

    def forget(self, passed: Mapping[Worker, float]) -> None:
        """Let go of what the journal may lack and all that catch up have passed; of others' workers, of all of it.

        Nothing is known any more of workers that are not in `passed`, once nothing of them is kept. Due each second.
        """
        for worker, run in list(self._runs.items()):
            count = passed.get(worker, inf)
            kept = [each for each in run.patch if each.end > count]
            self.size -= sum(each.size for each in run.patch) - sum(each.size for each in kept)
            run.patch = kept
            if worker not in passed and not (kept or run.batches):
                del self._runs[worker]
        self._suspect = {worker: span for worker, span in self._suspect.items() if span[1] > passed.get(worker, inf)}
        known = passed.keys() | self._runs.keys()
        self._opening = {worker: count for worker, count in self._opening.items() if worker in known}
        self._open &= known

    def covers(self, worker: Worker, position: int, reached: int) -> bool:
        """Return whether all of a worker's count from `position` up to `reached` is here."""
        if position >= reached:
            return True
        run = self._runs.get(worker)
        return run is not None and run.end == reached and run.whole_from <= position

    def whole_from(self, worker: Worker, reached: int) -> int:
        """Return the count from which on all of a worker's batches up to `reached` are here."""
        run = self._runs.get(worker)
        return run.whole_from if run is not None and run.end == reached else reached

    def kept_before(self, worker: Worker, position: int, stop: int) -> list[Numbered]:
        """Return the kept batches of a worker that end behind `position` and begin before `stop`."""
        run = self._runs.get(worker)
        kept = (*run.patch, *run.batches) if run else ()
        return [each for each in kept if each.end > position and each.total < stop]

    def at(self, number: int) -> Numbered:
        """Return a batch by its number."""
        return self._order[number - self.first][1]

    def find(self, worker: Worker, position: int) -> Numbered | None:
        """Return the first kept batch of a worker that ends behind `position`."""
        run = self._runs.get(worker)
        if run is None:
            return None
        for batches in (run.patch, run.batches):
            number = bisect_right(batches, position, key=lambda each: each.end)
            if number < len(batches):
                return batches[number]
        return None
