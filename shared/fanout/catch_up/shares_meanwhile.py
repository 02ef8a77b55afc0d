"""The members of a group as rows came live, for one of them that catches up: the past is shared as it was live. No I/O.

If others come or go meanwhile, the shares of today would give some of its rows to nobody, and some to two.
"""

from bisect import bisect_right
from collections.abc import Collection, Iterator, Sequence
from operator import itemgetter
from typing import Final, NamedTuple

from shared.bus.continuity import Worker
from shared.client import Client
from shared.datagrams.routing import Router
from shared.fanout.catch_up.window import Numbered

MOST_CHANGES: Final = 1024
"""Changes of the shares that are known for a worker's rows; rows before them are shared as at the begin."""


class Sharing(NamedTuple):
    """The routes of the members, and those of them that were joining: the others had their share."""

    router: Router
    joining: frozenset[str]


class SharesMeanwhile:
    """The sharing of one collector's rows, by worker and running count; what came before is shared as at the begin."""

    def __init__(self, members: Sequence[Client]) -> None:
        self._members: Sequence[Client] = ()
        self.replace(members)
        self._first = Sharing(self._router, frozenset())
        self._noted: dict[Worker, list[tuple[int, Sharing]]] = {}

    def replace(self, members: Sequence[Client]) -> None:
        """Share with these from now on."""
        if members != self._members:
            self._members, self._router = members, Router()
            self._router.replace(members)

    def note(self, live: Numbered, joining: Collection[str]) -> None:
        """Note a live batch, and those that were joining."""
        noted = self._noted.get(live.worker, [(0, self._first)])
        last = noted[-1][1]
        if self._router is last.router and not (joining or last.joining):
            return
        sharing = Sharing(self._router, frozenset(each.name for each in self._members if each.name in joining))
        if sharing != last:
            self._noted[live.worker] = noted
            noted.append((live.total, sharing))
            del noted[1:-MOST_CHANGES]

    def parts(self, rows: Numbered) -> Iterator[tuple[Sharing, Numbered]]:
        """Yield a batch with its sharing, in parts where that changes within: the journal joins small batches."""
        noted = self._noted.get(rows.worker, [(0, self._first)])
        index = bisect_right(noted, rows.total, key=itemgetter(0)) - 1
        while index + 1 < len(noted) and noted[index + 1][0] < rows.end:
            first, rows = rows.cut(noted[index + 1][0])
            yield noted[index][1], first
            index += 1
        yield noted[index][1], rows
