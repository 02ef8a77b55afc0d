"""Health of a collector, from the growth of its own counters and the state of the way there. No I/O."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from shared.client import Trouble
from shared.ledger.counters import (
    BUFFER_FULL,
    DESTINATION_REFUSED,
    DROPPED,
    INTERFACE_DOWN,
    NO_MEMORY,
    NO_NEIGHBOUR,
    NO_ROUTE,
    NOT_CONNECTED,
    OTHER_FAMILY,
    OVER_SHARE,
    QUEUE_FULL,
    RATE_LIMITED,
    REFUSALS,
    REFUSED,
    SENT,
    SOURCE_REFUSED,
    STOPPED,
    UNPLANNED,
    UNREACHABLES,
    UNSERVED,
    UNSURE,
    WITHHELD,
)
from shared.ledger.equations import is_loss, lost

CAUSES: Final[Mapping[str, Trouble]] = {
    **dict.fromkeys((UNREACHABLES, NOT_CONNECTED, NO_ROUTE, NO_NEIGHBOUR, INTERFACE_DOWN), "unreachable"),
    **dict.fromkeys((REFUSALS, REFUSED, WITHHELD), "refusing"),
    **dict.fromkeys((BUFFER_FULL, QUEUE_FULL, NO_MEMORY), "slow"),
}
"""The trouble that each counter is a sign of."""
HARMLESS: Final = frozenset(
    {DESTINATION_REFUSED, SOURCE_REFUSED, RATE_LIMITED, OTHER_FAMILY, OVER_SHARE, STOPPED, UNPLANNED, UNSERVED, UNSURE}
)
"""Drops by policy, for the kind of a datagram, or by an end of the service say nothing of the collector. Any other drop
is an error of the kernel, whatever its name: where nothing is delivered meanwhile the collector is unreachable."""
LASTING: Final = frozenset({UNREACHABLES, REFUSALS, REFUSED, WITHHELD})
"""Signs that come from sending alone: while nothing more is sent they stay, until something was delivered."""
EXAMINE_SECONDS: Final = 0.5
QUIET_SECONDS: Final = 0.4
"""A trouble is over after it has been gone for this long, which is two examinations."""


@dataclass(slots=True)
class Symptom:
    """One trouble of a collector: its start, and whether it lasts until one was delivered."""

    trouble: Trouble
    since: float
    lasting: bool = False
    _counted: int = 0
    _delivered: int = 0
    _gone_since: float | None = None

    def observe(self, counted: int, delivered: int, *, known: bool, now: float) -> bool:
        """Take in the counters and whether the trouble is `known` to be there; return whether it lasts."""
        if counted > self._counted or known:
            self._counted, self._delivered, self._gone_since = counted, delivered, None
        elif self._gone_since is not None:
            return now - self._gone_since < QUIET_SECONDS
        elif not self.lasting or delivered > self._delivered:
            self._gone_since = now
        return True


class Checkup:
    """Examines one collector, every `EXAMINE_SECONDS`.

    `lost` is how many of its datagrams are known by then to have reached nobody.
    """

    def __init__(self, account: Mapping[str, int] = MappingProxyType({})) -> None:
        """Begin with an account: its counts so far say nothing of the present."""
        self.lost = lost(account)
        self._before = dict(account)
        self._delivered = account.get(SENT, 0)
        self._counted: dict[Trouble, int] = {"unreachable": 0, "refusing": 0, "slow": 0}
        self._symptoms: dict[Trouble, Symptom] = {}

    def examine(self, account: Mapping[str, int], now: float, *, unreachable: bool) -> Symptom | None:
        """Return the collector's trouble, None if it has none; `unreachable`: there is no way to it now."""
        delivered, delivered_before = account.get(SENT, 0), self._delivered
        self._delivered = delivered
        losses = [name for name in account if is_loss(name)]
        self.lost = sum(account[name] for name in losses)
        causes = [name for name in losses if name in CAUSES or (name.startswith(DROPPED) and name not in HARMLESS)]
        if not (unreachable or causes or self._symptoms):
            return None
        counted, lasting = dict(self._counted), set()
        for name in causes:
            grown = account[name] - self._before.get(name, 0)
            if grown and (name in CAUSES or delivered == delivered_before):
                trouble = CAUSES.get(name, "unreachable")
                counted[trouble] += grown
                if name in LASTING or name not in CAUSES:
                    lasting.add(trouble)
            self._before[name] = account[name]
        for trouble, count in counted.items():
            known, before = unreachable and trouble == "unreachable", self._counted[trouble]
            if trouble not in self._symptoms and (known or count > before):
                self._symptoms[trouble] = Symptom(trouble, now, _counted=before)
            symptom = self._symptoms.get(trouble)
            if symptom is not None:
                symptom.lasting |= trouble in lasting
                if not symptom.observe(count, delivered, known=known, now=now):
                    del self._symptoms[trouble]
        self._counted = counted
        return next((self._symptoms[trouble] for trouble in counted if trouble in self._symptoms), None)
