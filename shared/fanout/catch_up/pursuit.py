"""One collector's way back to the live copies of one stream: what it gets next, and when it is level.

It reads the journal until the window of live batches covers the rest, then the window until nothing is left. All of it
is decided by the running counts of workers, and nothing by time. Pure.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import Final

import numpy as np

from shared.bus.bodies.journal_messages import JournalPlace, WorkerPosition
from shared.bus.continuity import Position, Worker
from shared.client import Place
from shared.datagrams.batch import ROW, DatagramBatch
from shared.fanout.catch_up.stream_place import StreamPlace
from shared.fanout.catch_up.window import Numbered, Window

PATIENCE_SECONDS: Final = 5.0
"""Time for which the journal may be at its end, and have less than was published, before that counts as missing."""
STRAY_SECONDS: Final = 5.0
"""Time after which a worker of the past of which nothing comes live is taken for one that has ended."""
GENERATION: Final = "generation"


class PursuitState(Enum):
    """The source of what a collector gets next."""

    READING = "reading"
    WINDOW = "window"
    LIVE = "live"


@dataclass(frozen=True, slots=True)
class Step:
    """Datagrams that a collector gets next, and how its place moves with them.

    `missing` were published before them and can't be had; `expired` of these the journal has removed. `discovered` of
    all of them were not among those that the collector was known to be owed.
    """

    numbered: Numbered
    batch: DatagramBatch | None
    stop: int
    missing: int = 0
    expired: int = 0
    discovered: int = 0


class Pursuit(StreamPlace):
    """A collector's place in a stream, while it moves on to the live copies."""

    def __init__(
        self, stream: str, since_ns: int, counts: Counter[str], clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(stream, since_ns, counts)
        self.state = PursuitState.READING
        self.by_window = False
        """True where there is no journal: the window has all that can be had."""
        self._exhausted = False
        """True once the window has no more, where there is no journal."""
        self.reader: JournalPlace | None = None
        """The place in the journal's files at which its last portion ended."""
        self.behind_live = False
        """True: nothing of the journal goes before what comes live, which rules may have copied."""
        self._clock = clock
        self._queue: deque[Numbered] = deque()
        self._fetched: dict[Worker, WorkerPosition] = {}
        self._expired = 0
        self._at_end = False
        """The journal had no more than what is queued."""
        self._asked_of: set[Worker] = set()
        """Workers whose beginning did not come live, and that were known when the journal was asked again."""
        self._number = 0
        """Of the window's next batch."""
        self._stray_at: dict[Worker, float] = {}
        """The time of the last datagrams of workers of which they had not come live."""
        self._asked_up_to: dict[Worker, int] = {}
        """The counts for which the journal was asked once more, of such workers."""
        self._short_since: float | None = None
        """The time since which the journal has been at its end, and less was there than was published."""
        self._ahead_since: float | None = None
        """The time since which the journal has had a batch that did not come live."""

    @property
    def queued(self) -> int:
        """Datagrams that the journal has sent and that the collector has still to get."""
        return sum(len(each.batch) for each in self._queue)

    def begin(
        self,
        places: Iterable[Place],
        followed: Mapping[Worker, Position],
        waiting: Mapping[Worker, int] = MappingProxyType({}),
    ) -> None:
        """Begin at these places; what came until now is not among what the collector's account has as owed.

        What is `waiting` to be routed is: from these counts on.
        """
        for place in places:
            if place.stream == self.stream:
                worker = place.worker, place.boot
                self._move(worker, place.total)
                self._pass_batch(worker, place.sequence, place.received_ns)
        for worker, position in followed.items():
            self._note_counted(worker, min(position.reached, waiting.get(worker, position.reached)))

    def positions(self) -> list[WorkerPosition]:
        """Return the places from which the journal is to be read on: behind what it has sent already."""
        found = {
            worker: WorkerPosition(*worker, self._sequences.get(worker, 0), total, self._received.get(worker, 0))
            for worker, total in self._totals.items()
        }
        return list((found | self._fetched).values())

    def queue(self, portion: Iterable[Numbered]) -> None:
        """Take what the journal has sent."""
        for numbered in portion:
            self._queue.append(numbered)
            self._short_since = None
            self._fetched[numbered.worker] = WorkerPosition(
                *numbered.worker, numbered.sequence + 1, numbered.end, numbered.batch.received_ns
            )

    def note_portion(
        self, place: JournalPlace | None, positions: Iterable[WorkerPosition], expired: int, *, at_end: bool
    ) -> None:
        """Note how the journal has ended a portion; `at_end`: it has no more now."""
        self.reader, self._at_end = place, at_end
        self._expired += expired
        for each in positions:
            worker = each.worker, each.boot
            self._fetched[worker] = max(self._fetched.get(worker, each), each, key=lambda at: at.total)

    def next_step(self, window: Window, followed: Mapping[Worker, Position], most: int) -> Step | None:
        """Return what the collector gets next, at most `most` datagrams; None: there is nothing now."""
        while self._queue:
            numbered = self._queue[0]
            at = self._place(numbered, followed)
            if numbered.end <= at:
                self._queue.popleft()
                continue
            if self.behind_live and self._comes_live(numbered, followed):
                return None
            if numbered.total > at:
                kept = window.find(numbered.worker, at)
                if kept and kept.total < numbered.total:
                    numbered = kept
                if numbered.total > at and self._awaits(numbered, followed):
                    return None
            return self._step(numbered, at, most, followed)
        if self.by_window:
            self._number = max(self._number, window.first)
        while self.state is PursuitState.WINDOW and self._number < window.stop:
            if self._number < window.first:
                self._read_again()
                return None
            numbered = window.at(self._number)
            at = self._place(numbered, followed) if self.by_window else self._totals.get(numbered.worker, 0)
            if numbered.end <= at:
                self._number += 1
            elif numbered.total > at and not self.by_window:  # it did not come to us, but perhaps to the journal
                self._read_again()
            else:
                return self._step(numbered, at, most, followed)
        return None

    def _comes_live(self, numbered: Numbered, followed: Mapping[Worker, Position]) -> bool:
        """Return whether a batch that the journal has may still come live; with the next one it is known to be lost."""
        position = followed.get(numbered.worker)
        if position is None or position.reached >= numbered.end:
            self._ahead_since = None
            return False
        self._ahead_since = self._clock() if self._ahead_since is None else self._ahead_since
        return self._clock() < self._ahead_since + PATIENCE_SECONDS

    def _awaits(self, numbered: Numbered, followed: Mapping[Worker, Position]) -> bool:
        """Return whether what is missing before a batch of the journal may still come live."""
        position = followed.get(numbered.worker)
        if position is None or position.reached >= numbered.total:
            self._short_since = None
            return False
        self._short_since = self._clock() if self._short_since is None else self._short_since
        return self._clock() < self._short_since + PATIENCE_SECONDS

    def _step(self, numbered: Numbered, at: int, most: int, followed: Mapping[Worker, Position]) -> Step:
        start = max(at, numbered.total)
        first = start - numbered.total
        last = min(len(numbered.batch), first + most)
        missing, stop = start - at, numbered.total + last
        expired = min(missing, self._expired)
        discovered = self._discovered(numbered.worker, at, stop, followed)
        return Step(numbered, numbered.batch.part(first, last), stop, missing, expired, discovered)

    def advance(self, step: Step) -> None:
        """Move the collector's place behind a step."""
        worker, numbered = step.numbered.worker, step.numbered
        self._expired -= step.expired
        self._move(worker, step.stop)
        if numbered.sequence != self._sequences.get(worker) or step.stop == numbered.end:
            done = step.stop == numbered.end
            self._pass_batch(worker, numbered.sequence + done, numbered.batch.received_ns)
        self.newest_ns = max(self.newest_ns, numbered.batch.received_ns)
        self._stray_at[worker] = self._clock()

    def place(self, step: Step) -> Place:
        """Return the place at which a step begins, behind what is missing before it."""
        worker, batch = step.numbered.worker, step.numbered.batch
        start = step.stop - (len(step.batch) if step.batch is not None else 0)
        return Place(self.stream, *worker, step.numbered.sequence, start, batch.received_ns)

    def rewind(self, place: Place, followed: Mapping[Worker, Position]) -> int:
        """Go back to a place; return how many datagrams are owed once more that its account has had an outcome of.

        Those that it did not have as owed when they were sent are found to be owed when they are sent again.
        """
        worker = place.worker, place.boot
        before, position = self._totals.get(worker, place.total), followed.get(worker)
        self._move(worker, place.total)
        self._pass_batch(worker, place.sequence, place.received_ns)
        self._queue.clear()
        self.reader = None  # that is behind what is to be read again
        self._read_again()
        if position is None:
            return 0
        return max(0, min(before, position.reached) - max(place.total, self._owed_from(worker, position)))

    def check(self, window: Window, followed: Mapping[Worker, Position], *, at_once: bool = False) -> PursuitState:
        """Return the state that it is in now; `at_once`: no more is awaited of the journal."""
        if self._queue:
            return self.state
        if self.state is PursuitState.READING and self._at_end and not at_once and (late := self._late(followed)):
            self._asked_of |= late
            self._at_end = False
        if self.state is PursuitState.READING and (self._at_end or at_once):
            self._begin_at_ends(window, followed)
            if self.by_window or all(self._covered(window, worker, each) for worker, each in followed.items()):
                self.state, self._number, self._short_since = PursuitState.WINDOW, window.first, None
            elif self._short_since is None:
                self._short_since = self._clock()
        if self.state is PursuitState.WINDOW and self._number == window.stop:
            ahead = [self._totals.get(worker, 0) - each.reached for worker, each in followed.items()]
            if any(each < 0 for each in ahead):
                self._exhausted = True
                self._read_again()
            elif more := self._kept_since(window, followed):
                self._asked_up_to |= more
                self._read_again()
            elif not self._strays(followed):
                self.state = PursuitState.LIVE
        return self.state

    def give_up(self, window: Window, followed: Mapping[Worker, Position], *, at_once: bool = False) -> list[Step]:
        """Queue what the window alone has, and return steps over what nobody has, once the journal was given time."""
        if self._queue or self.state is not PursuitState.READING or (self.by_window and not self._exhausted):
            return []
        self._exhausted = False
        waited = self._short_since is not None and self._clock() >= self._short_since + PATIENCE_SECONDS
        if not (at_once or (waited and not self._late(followed))):
            return []
        self._begin_at_ends(window, followed)
        steps = []
        for worker, each in followed.items():
            at = self._totals.get(worker, 0)
            if not self._covered(window, worker, each):
                stop = max(at, window.whole_from(worker, each.reached))
                if kept := window.kept_before(worker, at, stop):  # the journal has missed it, and the bus what follows
                    self.queue(kept)
                    continue
                nothing = Numbered(worker, self._sequences.get(worker, 0), stop, _NOTHING)
                steps.append(Step(nothing, None, stop, stop - at, 0, self._discovered(worker, at, stop, followed)))
        self._short_since = None
        return steps

    def _late(self, followed: Mapping[Worker, Position]) -> set[Worker]:
        """Return workers whose beginning the journal may have, and had nothing of when it was asked last."""
        unknown = followed.keys() - self._totals.keys() - self._fetched.keys() - self._asked_of
        return set() if self.by_window else {worker for worker in unknown if self._owed_from(worker, followed[worker])}

    def _begin_at_ends(self, window: Window, followed: Mapping[Worker, Position]) -> None:
        """Give each worker of which the journal had nothing a place: its end in the journal, or what is owed of it.

        Without a journal that is all that the window has: whoever told the places has had nothing of this worker.
        """
        for worker, each in followed.items():
            if worker not in self._totals:
                owed_from = self._owed_from(worker, each)
                if self.by_window and (first := window.find(worker, 0)):
                    owed_from = min(owed_from, first.total)
                known = self._fetched.get(worker, WorkerPosition(*worker, 0, owed_from, self.since_ns))
                self._move(worker, min(owed_from, known.total))
                self._pass_batch(worker, known.sequence, known.received_ns)
                if worker not in self._fetched and owed_from < each.reached:  # passed over, as older by its clock?
                    self.reader, self._at_end = None, False

    def _covered(self, window: Window, worker: Worker, position: Position) -> bool:
        return window.covers(worker, self._totals.get(worker, 0), position.reached)

    def _strays(self, followed: Mapping[Worker, Position]) -> bool:
        """Return whether a worker's datagrams may still come live that the collector has had from the journal."""
        now = self._clock()
        reached = {worker: each.reached for worker, each in followed.items()}
        ahead = {worker for worker, total in self._totals.items() if reached.get(worker, 0) < total}
        self._stray_at = {worker: self._stray_at.get(worker, now) for worker in ahead}
        return any(at > now - STRAY_SECONDS for at in self._stray_at.values())

    def _kept_since(self, window: Window, followed: Mapping[Worker, Position]) -> dict[Worker, int]:
        """Return how far the journal has come since it was asked, with workers of which it alone has had anything.

        The last of them it may never give: it is asked once.
        """
        known = ((worker, max(at, self._asked_up_to.get(worker, 0))) for worker, at in self._totals.items())
        heads = ((worker, at, window.heads.get(worker, 0)) for worker, at in known if worker not in followed)
        return {worker: head for worker, at, head in heads if head > at}

    def _read_again(self) -> None:
        self.state, self._at_end, self._short_since = PursuitState.READING, False, None
        self._expired = 0  # the journal tells of it again
        self._fetched.clear()


_NOTHING: Final = DatagramBatch("", 0, np.empty(0, ROW), b"")
