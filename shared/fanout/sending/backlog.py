"""Rows that wait for a collector, in order: a bounded queue, from which the oldest are dropped first and counted.

The transmitter holds what waits for a next hop to tell its link address, the forwarder what waits for room in a
collector's send buffer.
"""

import time
from collections import Counter, OrderedDict, deque
from dataclasses import dataclass, field
from typing import Final

from shared.datagrams.batch import Indices
from shared.datagrams.gathered import Gathered
from shared.ledger.counters import (
    HELD,
    LEFT_BEHIND,
    NO_MEMORY,
    SENT,
    TEMPLATES,
    TEMPLATES_HELD,
    TEMPLATES_LOST,
    TEMPLATES_SENT,
    WITHHELD,
)
from shared.ledger.equations import dropped
from shared.process.memory import MUCH, Memory

PACE_SECONDS: Final = 0.005
"""Pause behind each batch of templates: who joins has a small receive buffer, perhaps."""


@dataclass(frozen=True, slots=True)
class Held:
    """Rows of a batch (None: all) that wait, and the time at which they are dropped."""

    batch: Gathered
    rows: Indices | None
    expires_at: float

    @property
    def count(self) -> int:
        """The number of rows."""
        return len(self.batch) if self.rows is None else len(self.rows)


@dataclass(slots=True)
class Backlog:
    """The rows that one collector waits for, with limits on rows, on bytes of the batches they are in, and on seconds.

    Rows beyond a limit are dropped under `cause`; `memory` is shared with the other collectors. While it is `paused`
    nothing of it is to be sent: its collector has left, and may come back. Templates are counted apart, in `templates`,
    and leave at a pace.
    """

    account: Counter[str]
    cause: str
    seconds: float
    most_rows: int
    most_bytes: int
    memory: "BacklogMemory"
    paused: bool = False
    templates: Counter[str] = field(default_factory=Counter)
    paced_until: float = 0.0
    """The time before which nothing is to be sent, as templates have just left; 0: there is none."""
    _queue: deque[Held] = field(default_factory=deque)
    _bytes: int = 0
    _rows: int = 0

    def __bool__(self) -> bool:
        """Return whether anything waits."""
        return bool(self._queue)

    @property
    def waited_seconds(self) -> float:
        """Seconds that the oldest has waited; 0 when nothing waits."""
        return time.monotonic() - self._queue[0].expires_at + self.seconds if self._queue else 0.0

    def account_of(self, *, templates: bool) -> Counter[str]:
        """Return the account of templates, or of copies."""
        return self.templates if templates else self.account

    def paced(self, now: float) -> bool:
        """Return whether the next are to wait for a moment; not once many copies wait behind them."""
        if self.paced_until and (now >= self.paced_until or self._rows > self.most_rows // 2):
            self.paced_until = 0.0
        return self.paced_until > 0

    def pace(self) -> None:
        """Let the next wait for a moment."""
        self.paced_until = time.monotonic() + PACE_SECONDS

    def count_templates(self, made: int = 0) -> None:
        """Count templates that were made, and what has become of templates since the last time, beside the copies."""
        account, found = self.account, self.templates
        if not (made or found):
            return
        account[TEMPLATES] += made
        account[TEMPLATES_SENT] += found.pop(SENT, 0)
        account[TEMPLATES_LOST] += dropped(found) + found[WITHHELD] + found[LEFT_BEHIND]
        account[TEMPLATES_HELD] = found[HELD]
        self.templates = Counter({HELD: found[HELD]} if found[HELD] else {})

    def hold(self, batch: Gathered, rows: Indices | None) -> None:
        """Keep rows, behind those that wait already; drop the oldest beyond the limits."""
        now = time.monotonic()
        self._put(Held(batch, rows, now + self.seconds))
        self.expire(now)
        while self._rows > self.most_rows or self._bytes > self.most_bytes:
            self.drop_oldest()
        self.memory.make_room()

    def _put(self, held: Held, *, first: bool = False) -> None:
        (self._queue.appendleft if first else self._queue.append)(held)
        self.account_of(templates=held.batch.templates)[HELD] += held.count
        self._rows += 0 if held.batch.templates else held.count
        self._bytes += held.batch.payload_bytes
        self.memory.add_holder(held.batch, self, first=first)

    def pop_oldest(self) -> Held:
        """Remove and return the oldest."""
        held = self._queue.popleft()
        self.account_of(templates=held.batch.templates)[HELD] -= held.count
        if held.batch.templates:
            self.pace()
        else:
            self._rows -= held.count
        self._bytes -= held.batch.payload_bytes
        self.memory.remove_holder(held.batch, self)
        return held

    def put_back(self, held: Held, rows: Indices) -> None:
        """Hold what is left of the oldest, in its place and no longer than it."""
        self._put(Held(held.batch, rows, held.expires_at), first=True)

    def expire(self, now: float) -> None:
        """Drop what has waited too long."""
        while self._queue and self._queue[0].expires_at <= now:
            self.drop_oldest()

    def drop(self, cause: str = "") -> None:
        """Drop all of it."""
        while self._queue:
            self.drop_oldest(cause)

    def drop_oldest(self, cause: str = "") -> None:
        """Drop the rows of the oldest batch that are held."""
        held = self.pop_oldest()
        self.account_of(templates=held.batch.templates)[cause or self.cause] += held.count


class BacklogMemory:
    """The memory of the batches that any collector of a process waits for; each batch counts once.

    Beyond `limit` bytes the oldest batch is dropped, by all collectors that wait for rows of it.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self._holders: OrderedDict[int, dict[int, Backlog]] = OrderedDict()
        """Holders of rows of a batch, by its id and theirs; the batch that came first is the first."""

    def __bool__(self) -> bool:
        """Return whether anything waits for any collector."""
        return bool(self._holders)

    def add_holder(self, batch: Gathered, holding: Backlog, *, first: bool) -> None:
        """Note that `holding` holds rows of a batch, which is the newest, or with `first` the oldest."""
        if id(batch) not in self._holders:
            self._holders[id(batch)] = {}
            self._holders.move_to_end(id(batch), last=not first)
            self.used += batch.payload_bytes
        self._holders[id(batch)][id(holding)] = holding

    def remove_holder(self, batch: Gathered, holding: Backlog) -> None:
        """Note that `holding` holds rows of the batch no longer."""
        holders = self._holders[id(batch)]
        del holders[id(holding)]
        if not holders:
            del self._holders[id(batch)]
            self.used -= batch.payload_bytes

    def make_room(self) -> None:
        """Drop the oldest batches until what is left fits."""
        self._shrink(self.limit)

    def halve(self, memory: Memory) -> None:
        """Drop the oldest half: the process is short of memory."""
        if self.used >= MUCH:
            memory.note_freed()
        self._shrink(self.used // 2, NO_MEMORY)

    def clear(self, cause: str) -> None:
        """Drop everything, under a cause."""
        while self._holders:
            self._drop_oldest(cause)

    def _shrink(self, most: int, cause: str = "") -> None:
        while self.used > most:
            self._drop_oldest(cause)

    def _drop_oldest(self, cause: str) -> None:
        for holding in list(next(iter(self._holders.values())).values()):
            holding.drop_oldest(cause)
