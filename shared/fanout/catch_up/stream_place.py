"""A collector's place in a stream, by the running counts of its workers, and what is owed from there. Pure.

Counters keep it, for the next process if they are kept counts.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Final

from shared.bus.continuity import Position, Worker
from shared.client import Place
from shared.fanout.catch_up.window import Numbered

SEQUENCE, RECEIVED, COUNTED = "/sequence", "/received", "/counted"
"""Endings of the counters that are kept of a worker, beside its total. That one, and the last, are one more than they
say; 0: none."""
SINCE: Final = "since_ns"


class StreamPlace:
    """A collector's place in a stream. `counts` keeps it.

    Of workers without a place it is owed what was received at `since_ns` or later. Its account has a
    worker's datagrams as owed from a count on, which is kept too; of a worker that is not followed it has none.
    """

    def __init__(self, stream: str, since_ns: int, counts: Counter[str]) -> None:
        self.stream = stream
        if since_ns:
            counts[SINCE] = since_ns
        self.since_ns = counts.get(SINCE, since_ns)
        self._counts = counts
        self._totals: dict[Worker, int] = {}
        self._sequences: dict[Worker, int] = {}
        self._received: dict[Worker, int] = {}
        self._counted: dict[Worker, int] = {}
        for name in counts:
            worker = _parse(name)
            if worker and counts[name]:
                self._totals[worker] = counts[name] - 1
                self._sequences[worker] = counts.get(name + SEQUENCE, 0)
                self._received[worker] = counts.get(name + RECEIVED, 0)
            if name.endswith(COUNTED) and counts[name] and (worker := _parse(name.removesuffix(COUNTED))):
                self._counted[worker] = counts[name] - 1
        self.newest_ns = max((since_ns, *self._received.values()))
        """The time at which the last datagrams that it got were received."""

    @property
    def totals(self) -> Mapping[Worker, int]:
        """The place reached of each worker."""
        return self._totals

    def places(self) -> Iterator[Place]:
        """Yield its places."""
        for worker, total in self._totals.items():
            yield Place(self.stream, *worker, self._sequences.get(worker, 0), total, self._received.get(worker, 0))

    def deferred(self, followed: Mapping[Worker, Position]) -> int:
        """Return how many of the datagrams that its account has as owed it has still to get."""
        return sum(
            max(0, each.reached - max(self._totals.get(worker, 0), self._owed_from(worker, each)))
            for worker, each in followed.items()
        )

    def behind(self, followed: Mapping[Worker, Position]) -> int:
        """Return how many datagrams it has still to get, of the workers that are followed, as far as is known."""
        return sum(
            max(0, each.reached - self._totals.get(worker, self._owed_from(worker, each)))
            for worker, each in followed.items()
        )

    def passed_before(self, worker: Worker, start: int, stop: int) -> int:
        """Return how many of a worker's datagrams from `start` to `stop`, which now come live, it has had already."""
        ahead = min(stop, self._totals.get(worker, 0)) - start
        return max(0, ahead)

    def _place(self, numbered: Numbered, followed: Mapping[Worker, Position]) -> int:
        """Return the place reached of a batch's worker: it begins with the first that is had, or that is owed."""
        known, position = self._totals.get(numbered.worker), followed.get(numbered.worker)
        if known is not None:
            return known
        return min(numbered.total, self._owed_from(numbered.worker, position)) if position else numbered.total

    def _discovered(self, worker: Worker, start: int, stop: int, followed: Mapping[Worker, Position]) -> int:
        """Return how many datagrams from `start` to `stop` the collector's account does not have as owed now."""
        position = followed.get(worker)
        if position is None:
            return stop - start
        owed_from = self._owed_from(worker, position)
        return max(0, min(stop, owed_from) - start) + max(0, stop - max(start, position.reached, owed_from))

    def _owed_from(self, worker: Worker, position: Position) -> int:
        """Return the count from which on the collector's account has a worker's datagrams as owed."""
        return self._counted.get(worker, position.baseline)

    def _note_counted(self, worker: Worker, count: int) -> None:
        self._counted[worker] = count
        self._counts[_name(worker) + COUNTED] = count + 1

    def _move(self, worker: Worker, total: int) -> None:
        self._totals[worker] = total
        self._counts[_name(worker)] = total + 1

    def _pass_batch(self, worker: Worker, sequence: int, received_ns: int) -> None:
        self._sequences[worker], self._received[worker] = sequence, received_ns
        self._counts[_name(worker) + SEQUENCE] = sequence
        self._counts[_name(worker) + RECEIVED] = received_ns


def _name(worker: Worker) -> str:
    return f"{worker[0]}/{worker[1]:x}"


def _parse(name: str) -> Worker | None:
    """Return the worker whose place is kept under a name; None: it is the name of something else."""
    worker, slash, boot = name.partition("/")
    return (worker, int(boot, 16)) if slash and "/" not in boot else None
