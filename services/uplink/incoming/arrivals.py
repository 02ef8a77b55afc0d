"""Arrivals from other sites: in order, once, and what never came. No I/O.

Each batch tells its worker's running count of datagrams before it, as on the bus. What was reached already is a repeat;
what lies between is missed. A message that says that another one was sent before it, which has not come, waits for that
one for a while: JetStream may keep two messages in another order where a server failed between them.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from services.uplink.packs import Arrived
from shared.bus.continuity import MAX_GAP
from shared.ledger.accounts import Accounts, parse_arriving, unparse_arriving
from shared.ledger.counters import BASELINE, MISSED, REACHED, REPEATED, TAKEN

HOLD_SECONDS: Final = 10.0
"""Time that messages wait for an earlier one: longer than its sender waits for an acknowledgement, see `sending`."""
MAX_HELD: Final = 48 << 20
"""Bytes that may wait so, of all sites together. Beyond that, sites with more than an equal part wait for nothing."""
POSITION_COUNTERS: Final = (REACHED, BASELINE, TAKEN, MISSED, REPEATED)
MAX_ORIGINS: Final = 1024
"""Bounds the table; of the site with most origins the one goes first that sent nothing for longest."""


class Key(NamedTuple):
    """One start of a worker of another site, and a stream of its."""

    site: str
    worker: str
    boot: int
    stream: str


@dataclass(slots=True)
class Position:
    """The place reached in an origin's running count, and the messages behind it that wait for an earlier one."""

    baseline: int
    reached: int
    taken: int = 0
    missed: int = 0
    repeated: int = 0
    held: list[Arrived] = field(default_factory=list)
    held_until: float = 0.0

    def account(self) -> dict[str, int]:
        """Return its counters."""
        return {
            BASELINE: self.baseline,
            TAKEN: self.taken,
            MISSED: self.missed,
            REACHED: self.reached,
            REPEATED: self.repeated,
        }


class Arrivals:
    """Follows every origin of other sites."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.positions: dict[Key, Position] = {}
        self._clock = clock
        self._held: Counter[str] = Counter()
        """By site: the bytes that wait."""

    def restore(self, tables: Mapping[str, Mapping[str, int]]) -> None:
        """Go on from what the last process has left."""
        for name, counts in tables.items():
            if found := parse_arriving(name):
                baseline, taken, missed, reached, repeated = (
                    counts.get(each, 0) for each in (BASELINE, TAKEN, MISSED, REACHED, REPEATED)
                )
                # A kill between two stores leaves a difference: what was reached is what counts.
                taken = max(0, reached - baseline - missed)
                self.positions[Key(*found)] = Position(baseline, reached, taken, missed, repeated)

    def order(self, arrived: Arrived) -> list[Arrived]:
        """Return the messages whose batches are to be handled now that this one has come; each then goes to `note`."""
        key = _key(arrived)
        position = self.positions.get(key)
        if position is None or not position.reached < arrived.after <= position.reached + MAX_GAP:
            return [arrived]
        if not position.held:
            position.held_until = self._clock() + HOLD_SECONDS
        position.held.append(arrived)
        self._held[key.site] += arrived.size
        return self._release(key.site, position) if self._has_too_much(key.site) else []

    def _has_too_much(self, site: str) -> bool:
        """Return whether a site takes more than its part of a room that is full; who takes most is overdue then."""
        if self._held.total() <= MAX_HELD:
            return False
        ((fullest, _),) = self._held.most_common(1)
        if fullest != site:
            for key, position in self.positions.items():
                if key.site == fullest:
                    position.held_until = 0.0
        return self._held[site] * len(+self._held) > MAX_HELD

    def follow(self, arrived: Arrived) -> list[Arrived]:
        """Return a message that has waited for one that was handled just now, if there is one."""
        position = self.positions.get(_key(arrived))
        for each in position.held if position else ():
            assert position is not None
            if each.after <= position.reached:
                position.held.remove(each)
                self._held[arrived.origin.site] -= each.size
                return [each]
        return []

    def overdue(self, site: str) -> list[Arrived]:
        """Return the messages of a site that have waited long enough."""
        now, some = self._clock(), self.positions.items()
        due = [each for key, each in some if key.site == site and each.held and each.held_until <= now]
        return [arrived for position in due for arrived in self._release(site, position)]

    @property
    def holding(self) -> bool:
        """Return whether any message waits for an earlier one."""
        return self._held.total() > 0

    def _release(self, site: str, position: Position) -> list[Arrived]:
        held, position.held = sorted(position.held, key=lambda each: each.after), []
        self._held[site] -= sum(each.size for each in held)
        return held

    def had(self, key: Key, total: int, count: int) -> int:
        """Return how many of the first of `count` datagrams behind `total` have come before."""
        position = self.positions.get(key)
        return 0 if position is None else min(count, max(0, position.reached - total))

    def note(self, key: Key, total: int, count: int) -> None:
        """Note a batch of `count` datagrams behind `total`."""
        had = self.had(key, total, count)
        position = self.positions.pop(key, None)
        if position is None:
            if len(self.positions) >= MAX_ORIGINS:
                self._forget_one()
            position = Position(total, total)
        self.positions[key] = position  # the last of the table: it has sent last
        position.repeated += had
        if had == count:
            return
        gap = max(0, total - position.reached)
        if gap > MAX_GAP:  # more than anybody loses: it is followed anew
            position.baseline, gap = position.baseline + gap, 0
        position.missed += gap
        position.taken += count - had
        position.reached = total + count

    def _forget_one(self) -> None:
        """Make room at the cost of the site that takes most of it."""
        ((site, _),) = Counter(key.site for key in self.positions).most_common(1)
        key = next(key for key in self.positions if key.site == site)
        self._held[site] -= sum(each.size for each in self.positions.pop(key).held)

    def accounts(self) -> Accounts:
        """Return an account an origin."""
        return {unparse_arriving(*key): position.account() for key, position in self.positions.items()}


def _key(arrived: Arrived) -> Key:
    return Key(arrived.origin.site, arrived.origin.worker, arrived.boot, arrived.origin.stream)


def keys_of(arrived: Arrived) -> Iterator[tuple[Key, int, int]]:
    """Yield for each batch of a message its origin, the count before it, and its number of datagrams."""
    key = _key(arrived)
    for message in arrived.batches:
        assert message.batch is not None
        yield key, message.envelope.total, len(message.batch)
