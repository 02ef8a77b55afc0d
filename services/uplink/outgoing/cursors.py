"""Places that a journaled stream has reached on its way to JetStream, by worker. The acknowledged outlive a kill."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from services.uplink.packs import UNKNOWN, Pack
from shared.bus.continuity import Worker
from shared.bus.kept_counts import KeptCounts
from shared.client import Place

CURSOR: Final = "cursor/"
TOTAL, SEQUENCE, RECEIVED, BEGUN = "total", "sequence", "received_ns", "begun"
CURSOR_COUNTERS: Final = (TOTAL, SEQUENCE, RECEIVED, BEGUN)
MAX_WORKERS: Final = 256
"""Starts of workers that are known: as many as the journal tells of. The oldest that was followed by another start goes
first, as all of it is sent. A worker beyond that many others is not taken."""


@dataclass(slots=True)
class _Stretch:
    """Datagrams that are on their way, or that can't be had; `number` is that of their message."""

    number: str
    end: Place
    settled: bool = False


@dataclass(slots=True)
class _Cursor:
    """One worker's start: everything before `passed` is in the outbox or further, all before the kept place settled."""

    begun: int
    passed: Place
    counts: KeptCounts
    stretches: deque[_Stretch] = field(default_factory=deque)

    def settle(self, number: str) -> None:
        """Let the kept place go on as far as nothing before it is open: acknowledgements may overtake each other."""
        for stretch in self.stretches:
            if stretch.number == number:
                stretch.settled = True
                break
        while self.stretches and self.stretches[0].settled:
            self.keep(self.stretches.popleft().end)

    def keep(self, place: Place) -> None:
        """Keep a place; a kill between two stores leaves one that is right by its `total`."""
        self.counts[SEQUENCE], self.counts[RECEIVED] = place.sequence, place.received_ns
        self.counts[TOTAL] = place.total


class Cursors:
    """The places in one stream."""

    def __init__(self, stream: str, new_counts: Callable[[], KeptCounts]) -> None:
        self.stream = stream
        self._new_counts = new_counts
        self._cursors: dict[Worker, _Cursor] = {}

    def restore(self, tables: Mapping[str, Mapping[str, int]]) -> None:
        """Go on at the places that the last process has left."""
        for name, counts in tables.items():
            if name.startswith(f"{CURSOR}{self.stream}/"):
                worker, boot = name.split("/")[2:]
                numbers = (counts.get(each, 0) for each in (SEQUENCE, TOTAL, RECEIVED))
                self._begin(Place(self.stream, worker, int(boot, 16), *numbers), counts.get(BEGUN, 0))

    def begin(self, worker: Worker, total: int, received_ns: int) -> Place:
        """Begin with a worker, if it is not known; return its place."""
        if worker not in self._cursors:
            self._begin(Place(self.stream, *worker, 0, total, received_ns), total)
        return self._cursors[worker].passed

    def _begin(self, place: Place, begun: int) -> None:
        if len(self._cursors) >= MAX_WORKERS and (ended := self._ended_before((place.worker, place.boot))):
            del self._cursors[ended]
        cursor = self._cursors[place.worker, place.boot] = _Cursor(begun, place, self._new_counts())
        cursor.counts[BEGUN] = begun
        cursor.keep(place)

    def takes(self, worker: Worker) -> bool:
        """Return whether a worker is known, or there is room for it."""
        known = worker in self._cursors
        return known or len(self._cursors) < MAX_WORKERS or self._ended_before(worker) is not None

    def _ended_before(self, new: Worker) -> Worker | None:
        """Return the oldest start that is not the last one of its worker once there is a `new` one."""
        last = dict([*self._cursors.keys(), new])
        return next((worker for worker in self._cursors if last[worker[0]] != worker[1]), None)

    def __contains__(self, worker: Worker) -> bool:
        return worker in self._cursors

    def __bool__(self) -> bool:
        return bool(self._cursors)

    def begun(self, worker: Worker) -> int:
        """Return the worker's count at which this host began to send; 0 where it is not known."""
        return self._cursors[worker].begun if worker in self._cursors else 0

    def passed(self, worker: Worker) -> int:
        """Return the worker's count behind what is in the outbox, or further; UNKNOWN: it has no place here."""
        return self._cursors[worker].passed.total if worker in self._cursors else UNKNOWN

    def places(self) -> Iterator[Place]:
        """Yield the places from which on nothing is in the outbox, nor was."""
        for cursor in self._cursors.values():
            yield cursor.passed

    def owed(self, worker: Worker, reached: int) -> int:
        """Return how many of a worker's datagrams up to `reached` are not settled, as far as is kept."""
        return max(0, reached - self._cursors[worker].counts[TOTAL]) if worker in self._cursors else 0

    def put(self, pack: Pack) -> None:
        """Note that a message is in the outbox."""
        worker = pack.origin.worker, pack.boot
        self._add(
            worker, _Stretch(pack.number, Place(self.stream, *worker, pack.last + 1, pack.stop, pack.received_ns))
        )

    def skip(self, worker: Worker, total: int) -> None:
        """Note that nothing up to this count can be had."""
        if cursor := self._cursors.get(worker):
            end = Place(self.stream, *worker, cursor.passed.sequence, total, cursor.passed.received_ns)
            self._add(worker, _Stretch("", end, settled=True))
            cursor.settle("")

    def _add(self, worker: Worker, stretch: _Stretch) -> None:
        if cursor := self._cursors.get(worker):
            cursor.stretches.append(stretch)
            cursor.passed = stretch.end

    def settle(self, pack: Pack) -> None:
        """Note that a message needs not be sent any more."""
        if cursor := self._cursors.get((pack.origin.worker, pack.boot)):
            cursor.settle(pack.number)

    def tables(self) -> dict[str, KeptCounts]:
        """Return what is to be kept for the next process."""
        return {f"{CURSOR}{self.stream}/{name}/{boot:x}": each.counts for (name, boot), each in self._cursors.items()}
