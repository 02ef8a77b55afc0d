"""How a collector does, from the growth of its own counters and what is known of the way there now. No I/O."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from shared.client import Trouble
from shared.ledger import (
    BUFFER_FULL,
    DELIVERED,
    INTERFACE_DOWN,
    NO_MEMORY,
    NO_NEIGHBOUR,
    NO_ROUTE,
    NOT_CONNECTED,
    QUEUE_FULL,
    REFUSALS,
    REFUSED,
    UNREACHABLES,
    WITHHELD,
)

CAUSES: Final[Mapping[str, Trouble]] = {
    **dict.fromkeys((UNREACHABLES, NOT_CONNECTED, NO_ROUTE, NO_NEIGHBOUR, INTERFACE_DOWN), "unreachable"),
    **dict.fromkeys((REFUSALS, REFUSED, WITHHELD), "refusing"),
    **dict.fromkeys((BUFFER_FULL, QUEUE_FULL, NO_MEMORY), "slow"),
}
"""What each counter speaks for. What the policy, a filter or a datagram's own size stops says nothing of this."""
EXAMINE_SECONDS: Final = 0.5
QUIET_SECONDS: Final = 0.4
"""A trouble has to be gone for so long, which is two looks, before it is over."""


@dataclass(slots=True)
class Symptom:
    """One trouble of a collector: since when, and of how many datagrams."""

    trouble: Trouble
    since: float
    count: int = 0
    _counted: int = 0
    _delivered: int = 0
    _gone_since: float | None = None

    def observe(self, counted: int, delivered: int, *, known: bool, now: float) -> bool:
        """Take in what the counters are now and whether the trouble is `known` to be there; return whether it lasts."""
        if counted > self._counted or known:
            self.count += counted - self._counted
            self._counted, self._delivered, self._gone_since = counted, delivered, None
        elif self._gone_since is not None:
            return now - self._gone_since < QUIET_SECONDS
        elif self.trouble != "refusing" or delivered > self._delivered:
            self._gone_since = now  # a closed port answers only who sends: while nothing is sent it stays closed
        return True


class Checkup:
    """Looks at one collector, every `EXAMINE_SECONDS`."""

    def __init__(self) -> None:
        self._before: dict[Trouble, int] = {}
        self._symptoms: dict[Trouble, Symptom] = {}

    def examine(self, account: Mapping[str, int], now: float, *, unreachable: bool) -> Symptom | None:
        """Return what troubles the collector, None if nothing does; `unreachable`: there is no way to it now."""
        if not unreachable and not self._symptoms and CAUSES.keys().isdisjoint(account):
            return None
        counted: dict[Trouble, int] = {"unreachable": 0, "refusing": 0, "slow": 0}
        for cause, trouble in CAUSES.items():
            counted[trouble] += account.get(cause, 0)
        delivered = account.get(DELIVERED, 0)
        for trouble, count in counted.items():
            known = unreachable and trouble == "unreachable"
            before = self._before.get(trouble, 0)
            if trouble not in self._symptoms and (known or count > before):
                self._symptoms[trouble] = Symptom(trouble, now, 0, before)
            symptom = self._symptoms.get(trouble)
            if symptom is not None and not symptom.observe(count, delivered, known=known, now=now):
                del self._symptoms[trouble]
        self._before = counted
        return next((self._symptoms[trouble] for trouble in counted if trouble in self._symptoms), None)
