"""The accounts of what collectors that catch up have still to get, and of what they get twice on the bus. No I/O."""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from shared.bus.continuity import Position, Worker
from shared.fanout.catch_up.journal_questions import Pursued
from shared.fanout.catch_up.past_routes import PastRoutes
from shared.fanout.catch_up.rings import Rings
from shared.ledger.accounts import Accounts, unparse_owed
from shared.ledger.counters import OWED, OWED_FROM


class Owed:
    """Counts for the pursuits of one sender, `pursued`, by collector and stream; each stream has a window in `rings`.

    `positions` are those of a stream.
    """

    def __init__(
        self,
        pursued: Mapping[tuple[str, str], Pursued],
        rings: Rings,
        positions: Callable[[str], Mapping[Worker, Position]],
        routes: PastRoutes[Any],
    ) -> None:
        self._pursued = pursued
        self._rings = rings
        self._positions = positions
        self._routes = routes

    def deferred(self, name: str) -> int:
        """Return how many of the datagrams that a collector is owed wait in the journal."""
        return sum(
            self._pursued[name, stream].pursuit.deferred(self._positions(stream))
            for stream, _ in self._rings.items()
            if (name, stream) in self._pursued
        )

    def counted(self) -> dict[str, dict[Worker, tuple[int, int]]]:
        """Return baseline and count reached of each worker of the streams on which a collector catches up."""
        return {
            stream: {worker: (each.baseline, each.reached) for worker, each in self._positions(stream).items()}
            for stream in {stream for _, stream in self._pursued}
        }

    def note_counted(self, before: Mapping[str, Mapping[Worker, tuple[int, int]]]) -> None:
        """Note that workers' counts have moved on from `before`: what a collector has had already is not owed twice."""
        moved = {stream: spans for stream, counts in before.items() if (spans := self._moved(stream, counts))}
        for (name, stream), pursued in self._pursued.items() if moved else ():
            for worker, start, stop in moved.get(stream, ()):  # nothing for those begun meanwhile, at these counts
                if had := pursued.pursuit.passed_before(worker, start, stop):
                    self._routes.excuse(name, had)

    def _moved(self, stream: str, before: Mapping[Worker, tuple[int, int]]) -> list[tuple[Worker, int, int]]:
        """Return by how much counts of workers have grown at their beginning, and at their end: mostly one of them."""
        moved = []
        for worker, position in self._positions(stream).items():
            baseline, reached = before.get(worker, (position.baseline, position.baseline))
            spans = (position.baseline, baseline), (reached, position.reached)
            moved += [(worker, start, stop) for start, stop in spans if start < stop]
        return moved

    def accounts(self) -> Accounts:
        """Return one account a collector that catches up and stream: what it has still to get, and from when on."""
        positions = cache(self._positions)
        return {
            unparse_owed(stream, name): {
                OWED: each.pursuit.behind(positions(stream)),
                OWED_FROM: each.pursuit.newest_ns,
            }
            for (name, stream), each in self._pursued.items()
        }
