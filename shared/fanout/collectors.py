"""The collectors that one service sends copies to: their destinations, the routes to them, and the account of each."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, Generic, Protocol, TypeVar

from shared.client import ALL_STREAMS, Client
from shared.datagrams.gathered import Gathered
from shared.datagrams.routing import ALL_ROWS, Router, Selection, takes_all
from shared.fanout.backlog import Backlog
from shared.fanout.health import Checkup, Symptom
from shared.ledger import EXPECTED, FILTERED, MISSED, OFFERED, SAMPLED_OUT, SHARED_OUT, Accounts, dropped

RETURN_SECONDS: Final = 10.0
"""Time for which a collector that has left may come back to its socket, queue and account: its connection was lost."""
MAX_DEPARTED: Final = 256
"""Collectors kept for that; the first to leave go first."""


class Destination(Protocol):
    """The way in which one collector is reached."""

    client: Client
    held: Backlog

    @property
    def unreachable(self) -> bool:
        """Return whether the way to it is known to be broken now."""

    def adopt(self, client: Client) -> None:
        """Serve another entry of the same address and port from now on."""

    def refresh(self) -> None:
        """Check, with every look, what may have changed on the way there."""

    def close(self) -> None:
        """Release what is held for it."""


D = TypeVar("D", bound=Destination)


@dataclass(slots=True)
class Served(Generic[D]):
    """A collector being served.

    Its account is complete up to a moment: `baseline` counts the datagrams that its streams had carried by then, and
    `unseen` those that had reached us. `passed` counts those since then that its prefixes let pass, where it has any or
    takes only some of them.
    """

    destination: D
    account: Counter[str]
    baseline: int = 0
    unseen: int = 0
    passed: int = 0
    checkup: Checkup = field(default_factory=Checkup)


@dataclass(slots=True)
class _Departed(Generic[D]):
    """A collector that has left, until when it may come back, and the drops that its account ended with."""

    served: Served[D]
    until: float
    dropped: int


class Collectors(Generic[D]):
    """Every collector whose copies this process sends.

    `published` counts each stream's datagrams (see `Streams`); `reach` makes a collector's destination, which counts
    its work in the account that it is given.
    """

    def __init__(
        self,
        streams: Iterable[str],
        published: Mapping[str, int],
        reach: Callable[[Client, Counter[str]], D],
    ) -> None:
        self.set_streams(streams)
        self._published = published
        self._routed: Counter[str] = Counter()
        """Datagrams that came, by stream, whether anybody got them or not."""
        self._reach = reach
        self._served: dict[str, Served[D]] = {}
        self._departed: dict[str, _Departed[D]] = {}
        self.left = 0
        """Datagrams that waited for collectors that left, or moved."""
        self._router = Router()

    def set_streams(self, streams: Iterable[str]) -> None:
        """Set the streams that exist, for collectors that want all of them."""
        self._streams = tuple(streams)

    def replace(self, clients: Iterable[Client]) -> None:
        """Serve these collectors from now on.

        One that has changed, but not its address and port, keeps its destination and its account. So does one that left
        a moment ago: its waiting copies stayed until now.
        """
        before, self._served = self._served, {}
        for client in clients:
            self._served[client.name] = self._serve(client, before.pop(client.name, None))
        until = time.monotonic() + RETURN_SECONDS
        for name, served in before.items():
            self._settle(served)
            served.destination.held.paused = True
            self._departed[name] = _Departed(served, until, dropped(served.account))
        self._close_departed()
        self._router.replace(served.destination.client for served in self._served.values())

    def _serve(self, client: Client, known: Served[D] | None) -> Served[D]:
        if known and known.destination.client == client:
            return known
        if known:
            self._settle(known)
        elif departed := self._departed.pop(client.name, None):
            known = departed.served
        if known and _place(known.destination.client) == _place(client):
            known.destination.adopt(client)
            known.destination.held.paused = False
        else:
            if known:
                self._close(known, dropped(known.account))
            account: Counter[str] = Counter()
            known = Served(self._reach(client, account), account)
        self._begin(known)
        return known

    def _close(self, served: Served[D], dropped_before: int) -> None:
        """Close a destination whose account has ended with `dropped_before`; count what waited for it."""
        served.destination.close()
        self.left += dropped(served.account) - dropped_before

    def _close_departed(self) -> None:
        """Close those that have been away for too long, and the first ones beyond a number."""
        now = time.monotonic()
        for name, departed in list(self._departed.items()):
            if departed.until <= now or len(self._departed) > MAX_DEPARTED:
                self._close(departed.served, departed.dropped)
                del self._departed[name]

    def forget_departed(self) -> None:
        """Wait no longer for collectors that have left."""
        for departed in self._departed.values():
            self._close(departed.served, departed.dropped)
        self._departed = {}

    def _begin(self, served: Served[D]) -> None:
        """Let what comes from now on be counted for a collector."""
        client = served.destination.client
        served.baseline, served.unseen = (
            self._of_streams(self._published, client),
            self._of_streams(self._routed, client),
        )
        served.passed = 0

    def _settle(self, served: Served[D]) -> None:
        """Count what has come for a collector since this was done last."""
        # All collectors of a stream are offered the same, so nothing is counted for one that gets nothing of a batch.
        client, account = served.destination.client, served.account
        offered = self._of_streams(self._routed, client) - served.unseen
        account[EXPECTED] += self._of_streams(self._published, client) - served.baseline
        account[OFFERED] += offered
        if not takes_all(client):
            account[FILTERED] += offered - served.passed
        self._begin(served)

    def streams_wanted(self) -> set[str]:
        """The streams that any collector wants.

        A stream that a collector names need not be known here: another service may have read of it before us.
        """
        named = {stream for served in self._served.values() for stream in served.destination.client.streams}
        return named.union(self._streams) - {ALL_STREAMS} if ALL_STREAMS in named else named

    def _of_streams(self, counts: Mapping[str, int], client: Client) -> int:
        return sum(count for stream, count in counts.items() if client.wants(stream))

    def count_missed(self, stream: str, missed: int) -> None:
        """Count datagrams that the bus lost of a stream, for each collector that would have been offered them."""
        for client in self._router.clients(stream):
            self._served[client.name].account[MISSED] += missed

    def route(self, batch: Gathered) -> list[tuple[D, Selection]]:
        """Return the rows for each collector that gets any, and count those that it does not get."""
        self._routed[batch.stream] += len(batch)
        routed = []
        for client, selection in self._router.route(batch):
            served = self._served[client.name]
            if selection is not ALL_ROWS:
                served.passed += len(batch) - selection.filtered
                served.account[SHARED_OUT] += selection.shared_out
                served.account[SAMPLED_OUT] += selection.sampled_out
            routed.append((served.destination, selection))
        return routed

    def refresh(self) -> None:
        """Let each destination check its way again."""
        for served in self._served.values():
            served.destination.refresh()
        self._close_departed()

    def examine(self, now: float) -> Iterator[tuple[Client, Symptom | None, int]]:
        """Examine each collector; yield those that have a trouble, or have lost datagrams, with how many."""
        for served in self._served.values():
            destination = served.destination
            symptom = served.checkup.examine(served.account, now, unreachable=destination.unreachable)
            if symptom is not None or served.checkup.lost:
                yield destination.client, symptom, served.checkup.lost

    def accounts(self) -> Accounts:
        """Return one account a collector."""
        for served in self._served.values():
            self._settle(served)
        return {f"collector/{name}": dict(served.account) for name, served in self._served.items()}

    def close(self) -> None:
        """Close all destinations."""
        for served in self._served.values():
            served.destination.close()
        self._served = {}
        self.forget_departed()


def _place(client: Client) -> tuple[str, int]:
    return client.address, client.port
