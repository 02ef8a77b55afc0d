"""The collectors that one service sends copies to: their destinations, the routes to them, and the account of each."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from shared.client import ALL_STREAMS, Client
from shared.datagrams.gathered import Gathered
from shared.datagrams.routing import ALL_ROWS, Router, Selection, takes_all
from shared.fanout.health import Checkup, Symptom
from shared.ledger import EXPECTED, FILTERED, MISSED, OFFERED, SAMPLED_OUT, SHARED_OUT, Accounts


class Destination(Protocol):
    """The way in which one collector is reached."""

    client: Client

    @property
    def unreachable(self) -> bool:
        """Return whether the way to it is known to be broken now."""

    def refresh(self) -> None:
        """Check, with every look, what may have changed on the way there."""

    def close(self) -> None:
        """Release what is held for it."""


D = TypeVar("D", bound=Destination)


@dataclass(slots=True)
class Served(Generic[D]):
    """A collector being served.

    `baseline` counts the datagrams that its streams had carried when it signed up, and `unseen` those that had reached
    us. `passed` counts those since then that its prefixes let pass, where it has any or takes only some of them.
    """

    destination: D
    account: Counter[str]
    baseline: int
    unseen: int
    passed: int = 0
    checkup: Checkup = field(default_factory=Checkup)


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
        self._router = Router()

    def set_streams(self, streams: Iterable[str]) -> None:
        """Set the streams that exist, for collectors that want all of them."""
        self._streams = tuple(streams)

    def replace(self, clients: Iterable[Client]) -> None:
        """Serve these collectors from now on; one that did not change keeps its destination and its account."""
        kept: dict[str, Served[D]] = {}
        for client in clients:
            known = self._served.get(client.name)
            if known and known.destination.client == client:
                kept[client.name] = self._served.pop(client.name)
            else:
                account: Counter[str] = Counter()
                baseline, unseen = self._of_streams(self._published, client), self._of_streams(self._routed, client)
                kept[client.name] = Served(self._reach(client, account), account, baseline, unseen)
        self.close()
        self._served = kept
        self._router.replace(served.destination.client for served in kept.values())

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

    def examine(self, now: float) -> Iterator[tuple[Client, Symptom | None, int]]:
        """Examine each collector; yield those that have a trouble, or have lost datagrams, with how many."""
        for served in self._served.values():
            destination = served.destination
            symptom = served.checkup.examine(served.account, now, unreachable=destination.unreachable)
            if symptom is not None or served.checkup.lost:
                yield destination.client, symptom, served.checkup.lost

    def accounts(self) -> Accounts:
        """Return one account a collector."""
        return {f"collector/{name}": self._account(served) for name, served in self._served.items()}

    def _account(self, served: Served[D]) -> dict[str, int]:
        # All collectors of a stream are offered the same, so nothing is counted for one that gets nothing of a batch.
        client = served.destination.client
        offered = self._of_streams(self._routed, client) - served.unseen
        account = {**served.account, OFFERED: offered}
        if not takes_all(client):
            account[FILTERED] = offered - served.passed
        return {**account, EXPECTED: self._of_streams(self._published, client) - served.baseline}

    def close(self) -> None:
        """Close all destinations."""
        for served in self._served.values():
            served.destination.close()
        self._served = {}
