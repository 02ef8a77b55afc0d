"""Collectors that catch up by themselves: when one is away, its live copies end where it was last reached.

Copies that a closed port or a missing host refuses are owed to it still. Its account has them as `left_behind`, not as
dropped, and the journal brings them when it is back.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, Generic

from shared.bus.continuity import Position, Worker
from shared.client import Client
from shared.fanout.collectors import Collectors
from shared.fanout.served_collector import D, Served
from shared.ledger.counters import (
    INTERFACE_DOWN,
    LEFT_BEHIND,
    NO_NEIGHBOUR,
    NO_ROUTE,
    NOT_CONNECTED,
    REFUSALS,
    REFUSED,
    UNREACHABLES,
    WITHHELD,
)

UNSENT: Final = (REFUSED, NOT_CONNECTED, WITHHELD, NO_ROUTE, NO_NEIGHBOUR, INTERFACE_DOWN)
"""Counters of copies that did not leave since the collector is away."""
SIGNS: Final = (*UNSENT, REFUSALS, UNREACHABLES)
"""Counters that grow when it is."""


def signs(account: Counter[str]) -> int:
    """Return a number that grows when a collector is found to be away."""
    return sum(account[sign] for sign in SIGNS)


def unsent(account: Counter[str]) -> Counter[str]:
    """Return the copies that did not leave, by cause."""
    return Counter({cause: account[cause] for cause in UNSENT if account[cause]})


def put_off(served: Served[D], before: Counter[str]) -> None:
    """Count what was not sent since `before`, and what waits, as left behind: it is not lost."""
    account = served.account
    for cause, count in unsent(account).items():
        if (grown := count - before[cause]) > 0:
            account[cause] -= grown
            account[LEFT_BEHIND] += grown
    served.destination.held.drop(LEFT_BEHIND)


@dataclass(slots=True)
class _Guard:
    """A live collector, as of the last copies that left for it: its account then, and the counts at which they began.

    `held` has, by stream, the counts at which the first of the copies began that wait for it.
    """

    account: Counter[str]
    signs: int
    unsent: Counter[str]
    last: tuple[str, dict[Worker, int]] = field(default_factory=lambda: ("", {}))
    held: dict[str, dict[Worker, int]] = field(default_factory=dict)


class Absences(Generic[D]):
    """Watches the live copies of collectors that have `catch_up`; `went_away` is told of one, and of where it was."""

    def __init__(self, collectors: Collectors[D], positions: Callable[[str], Mapping[Worker, Position]]) -> None:
        self._collectors = collectors
        self._positions = positions
        self._guards: dict[str, _Guard] = {}
        self._streams: dict[str, list[str]] = {}
        """By stream: the live collectors that are watched on it."""
        self._starts: dict[str, dict[Worker, int]] = {}
        """By stream: where the batches began that wait to be sent."""

    def watch(self, clients: Iterable[Client], streams_of: Callable[[Client], Iterable[str]]) -> None:
        """Watch these collectors from now on, each at the streams that `streams_of` tells."""
        before, self._guards, self._streams = self._guards, {}, {}
        for client in clients:
            if client.catch_up and (streams := list(streams_of(client))):
                account = self._collectors[client.name].account
                guard = before.get(client.name)
                if guard is None or guard.account is not account:
                    guard = _Guard(account, signs(account), unsent(account))
                self._guards[client.name] = guard
                for stream in streams:
                    self._streams.setdefault(stream, []).append(client.name)

    def note_live(self, worker: Worker, stream: str, total: int) -> None:
        """Note a batch that has come and waits to be sent."""
        if stream in self._streams:
            self._starts.setdefault(stream, {}).setdefault(worker, total)

    def before_sending(self, stream: str) -> list[str]:
        """Return those that are found to be away before batches of a stream are sent: what left last did not arrive."""
        away = []
        for name in self._streams.get(stream, ()):
            served, guard = self._collectors[name], self._guards[name]
            served.destination.read_errors()
            if signs(served.account) > guard.signs:
                away.append(name)
        return away

    def after_sending(self, stream: str) -> list[str]:
        """Return those that are found to be away now that batches of a stream were sent."""
        starts, away = self._starts.pop(stream, {}), []
        for name in self._streams.get(stream, ()):
            served, guard = self._collectors[name], self._guards[name]
            guard.last = stream, starts
            if signs(served.account) > guard.signs:
                away.append(name)
            elif served.destination.held:
                guard.held.setdefault(stream, starts)
            else:
                guard.held.pop(stream, None)
                guard.unsent = unsent(served.account)
        return away

    def unsent_from(self, stream: str) -> Mapping[Worker, int]:
        """Return where the batches of a stream begin that wait to be sent."""
        return self._starts.get(stream, {})

    def waiting(self) -> list[str]:
        """Return those that are found to be away while copies wait for them."""
        return [
            name
            for name, guard in self._guards.items()
            if guard.held
            and (self._collectors[name].destination.unreachable or signs(self._collectors[name].account) > guard.signs)
        ]

    def watches(self, name: str) -> bool:
        """Return whether a collector is watched."""
        return name in self._guards

    def leave(self, name: str) -> Callable[[str], dict[Worker, int]]:
        """Put off what did not leave; return what tells, by stream, from which counts on it is owed."""
        guard, served = self._guards.pop(name), self._collectors[name]
        put_off(served, guard.unsent)

        def owed_from(stream: str) -> dict[Worker, int]:
            found = {worker: each.reached for worker, each in self._positions(stream).items()}
            last = guard.last[1] if guard.last[0] == stream else None
            for starts in (self._starts.get(stream), last, guard.held.get(stream)):
                for worker, total in (starts or {}).items():
                    found[worker] = min(found.get(worker, total), total)
            return found

        return owed_from
