"""A journaled stream on its way out: what finds no room, or did not come by the bus, is read from the journal later.

It is *live* while each batch of the bus goes into a message. When one can't, live batches are kept in a window for a
while, and the journal is read from the place that was reached. Once that and the window have all, it is live again.
`shared.fanout.pursuit` decides that, as for a collector that catches up.
"""

import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import replace
from math import inf
from typing import Final, NamedTuple

from services.uplink.outgoing.batches import Taken
from services.uplink.outgoing.cursors import Cursors
from shared.bus.continuity import Position, Worker
from shared.bus.kept_counts import KeptCounts
from shared.client import Place
from shared.datagrams.limits import MAX_ROWS
from shared.fanout.catch_up.journal_questions import Pursued
from shared.fanout.catch_up.pursuit import Pursuit, PursuitState, Step
from shared.fanout.catch_up.window import Numbered, Window
from shared.log import get_logger

JOINING_SECONDS: Final = 10.0
"""After a stream is first sent: a worker that is found so soon was there before, and owes nothing of that time."""
LATE_NS: Final = 10_000_000_000
"""A worker that began this long before the last process ended, and is not known, has nothing that is owed."""

log = get_logger()


class Owed(NamedTuple):
    """Datagrams that are newly to be sent, and beside them those that nobody has, and those of workers too many."""

    datagrams: int
    lost: int
    refused: int


class JournaledStream:
    """Decides for one stream from where its next batches come."""

    def __init__(
        self,
        stream: str,
        positions: Callable[[], Mapping[Worker, Position]],
        new_counts: Callable[[], KeptCounts],
        window_bytes: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stream = stream
        self.cursors = Cursors(stream, new_counts)
        self.pursued: Pursued | None = None
        """The way through the journal; None: it is live."""
        self._missing = 0
        """Datagrams that nobody had, on this way through the journal."""
        self._positions = positions
        self._window_bytes = window_bytes
        self._clock = clock
        self._window = self._new_window()
        self._joining_until = -1.0
        self._before: dict[Worker, tuple[int, int]] = {}
        """The counts of each worker from which on, and up to which, `newly_owed` has told what is owed."""
        self._refused: set[Worker] = set()

    def _new_window(self) -> Window:
        return Window(self._clock, most_bytes=self._window_bytes)

    def begin(self, tables: Mapping[str, Mapping[str, int]], alive_ns: int) -> int:
        """Go on where the last process has stopped, which lived until then; return how many datagrams are owed."""
        self.cursors.restore(tables)
        positions = self._positions()
        for worker, each in positions.items():
            if not self.refuses(worker):
                self.cursors.begin(worker, each.reached, alive_ns)
            self._before[worker] = each.baseline, each.reached
        if self.cursors:
            self.defer(max(0, alive_ns - LATE_NS))
        else:
            self._joining_until = self._clock() + JOINING_SECONDS
        return sum(self.cursors.owed(worker, each.reached) for worker, each in positions.items())

    def refuses(self, worker: Worker) -> bool:
        """Return whether a worker is one too many: nothing of it is sent, from its first datagram to its last."""
        if worker not in self._refused and not self.cursors.takes(worker):
            self._refused.add(worker)
        return worker in self._refused

    def is_broken_by(self, taken: Taken) -> bool:
        """Return whether something is missing before a batch of the bus: then the journal is to be read, if it is not.

        A worker that is not known has begun since this host sends the stream: the journal has what it sent at first.
        """
        envelope = taken.message.envelope
        worker, start = (envelope.sender, envelope.boot), envelope.total - taken.missed
        if worker in self.cursors:
            return self.pursued is None and taken.missed > 0
        if self.refuses(worker):
            return False
        known = start if self._clock() < self._joining_until else 0
        self.cursors.begin(worker, known, taken.batch.received_ns)
        return self.pursued is None and start > known

    def defer(self, since_ns: int = 0) -> None:
        """Read the journal from what was passed on; of workers that are not known, what came since a time."""
        places, positions = self._places(), self._positions()
        waiting = {worker: self._before.get(worker, (each.baseline, 0))[0] for worker, each in positions.items()}
        for place in places:
            worker = place.worker, place.boot
            waiting[worker] = max(place.total, waiting.get(worker, 0))
        pursuit = Pursuit(self.stream, since_ns or time.time_ns() - LATE_NS, Counter(), self._clock)
        pursuit.begin(places, positions, waiting)
        self.pursued = Pursued("other sites", 0, pursuit)
        self._missing = 0

    def _places(self) -> list[Place]:
        """Return the places from which to read, of a worker's starts in the order that a reader of the journal needs.

        It reads a worker from its last place on, and from there all later starts: that is the oldest that is not done.
        """
        done: list[Place] = []
        going_on: list[Place] = []
        for place in self.cursors.places():
            position = self._positions().get((place.worker, place.boot))
            (going_on if position and place.total < position.reached else done).append(place)
        return done + going_on[::-1]

    def keep(self, taken: Taken) -> None:
        """Keep a batch of the bus for later."""
        envelope, body, batch = taken.message.envelope, taken.message.body, taken.batch
        if getattr(body, "chunk", None) is not None:  # its memory is the worker's
            batch = replace(batch, payload=bytes(batch.payload))
        self._window.add(Numbered((envelope.sender, envelope.boot), envelope.sequence, envelope.total, batch))

    def confirm(self, boot: Hashable, reached: Mapping[Worker, int]) -> None:
        """Note what the journal has, as its status tells."""
        self._window.confirm(boot, reached)

    def tidy(self) -> None:
        """Let go of what is not needed in the window, and of what is known of workers that have ended."""
        totals = self.pursued.pursuit.totals if self.pursued else None
        self._window.forget({worker: inf if totals is None else totals.get(worker, 0) for worker in self._positions()})

    def newly_owed(self) -> Owed:
        """Return what has become owed since the last call; what was read from the journal before it came is not."""
        datagrams = lost = refused = 0
        told, self._before = self._before, {}
        for worker, each in self._positions().items():
            baseline, reached = told.get(worker, (each.baseline, each.baseline))
            if self.refuses(worker):
                self._before[worker] = each.baseline, each.reached
                refused += each.reached - reached + baseline - each.baseline
                continue
            ahead = self.pursued.pursuit.passed_before(worker, reached, each.reached) if self.pursued else 0
            nobody_has = max(0, min(baseline, self.cursors.begun(worker)) - each.baseline)
            self._before[worker] = each.baseline if nobody_has else baseline, each.reached
            datagrams += each.reached - reached - ahead
            lost += nobody_has
        return Owed(datagrams, lost, refused)

    def steps(self, room: Callable[[], bool]) -> Iterator[Step]:
        """Yield what goes next, out of the journal and the window, while there is room."""
        pursued, positions = self.pursued, self._positions()
        while pursued is not None and pursued is self.pursued and room():
            step = pursued.pursuit.next_step(self._window, positions, MAX_ROWS)
            if step is None:
                return
            yield from self._advance(pursued.pursuit, step)

    def settle(self, *, gone: bool) -> Iterator[Step]:
        """Yield what can't be had, `gone` if there is no journal; be live again if nothing is left."""
        if self.pursued is None:
            return
        pursuit, positions = self.pursued.pursuit, self._positions()
        for step in pursuit.give_up(self._window, positions, at_once=gone):
            yield from self._advance(pursuit, step)
        if self.pursued.check(self._window, positions, at_once=gone) is PursuitState.LIVE:
            self.pursued, self._window = None, self._new_window()
            if self._missing:
                told = "other sites go without datagrams that came neither by the bus nor from the journal"
                log.warning(told, stream=self.stream, datagrams=self._missing)
            else:
                log.info("what other sites are to have has been read from the journal", stream=self.stream)

    def _advance(self, pursuit: Pursuit, step: Step) -> Iterator[Step]:
        """Move on by a step, and yield it, if it is of a worker that is sent."""
        start, worker = step.stop - (len(step.batch) if step.batch is not None else 0), step.numbered.worker
        pursuit.advance(step)
        self._missing += step.missing
        if not self.refuses(worker):
            self.cursors.begin(worker, start - step.missing, step.numbered.batch.received_ns)
            yield step
