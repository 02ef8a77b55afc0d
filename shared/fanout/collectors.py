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
    """How one collector is reached."""

    client: Client

    @property
    def unreachable(self) -> bool:
        """Whether it is known that there is no way to it now."""

    def refresh(self) -> None:
        """Learn anew, with every look, what may have changed on the way there."""

    def close(self) -> None:
        """Let go of what is held for it."""


D = TypeVar("D", bound=Destination)


@dataclass(slots=True)
class Served(Generic[D]):
    """A collector being served.

    `baseline` and `unseen` are how many datagrams its streams had carried, and brought us, when it signed up; `passed`
    is how many of those since then its prefixes let pass, where it has any or takes only some of them.
    """

    destination: D
    account: Counter[str]
    baseline: int
    unseen: int
    passed: int = 0
    checkup: Checkup = field(default_factory=Checkup)


class Collectors(Generic[D]):
    """Every collector that has its copies from us.

    `published` counts each stream's datagrams (see `Streams`); `reach` makes a collector's destination, which counts
    what it does in the account it is given.
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
        """By stream: datagrams that came, whoever got them."""
        self._reach = reach
        self._served: dict[str, Served[D]] = {}
        self._router = Router()

    def set_streams(self, streams: Iterable[str]) -> None:
        """Have these as the streams that there are, for who wants all of them."""
        self._streams = tuple(streams)

    def replace(self, clients: Iterable[Client]) -> None:
        """Serve these from now on; one that did not change keeps its destination and its account."""
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
        """The streams that any of them wants.

        Those that it names need not be known here: another service may have read of them before us.
        """
        named = {stream for served in self._served.values() for stream in served.destination.client.streams}
        return named.union(self._streams) - {ALL_STREAMS} if ALL_STREAMS in named else named

    def _of_streams(self, counts: Mapping[str, int], client: Client) -> int:
        return sum(count for stream, count in counts.items() if client.wants(stream))

    def count_missed(self, stream: str, missed: int) -> None:
        """Count datagrams of a stream that the bus lost for each collector that would have been offered them."""
        for client in self._router.clients(stream):
            self._served[client.name].account[MISSED] += missed

    def route(self, batch: Gathered) -> list[tuple[D, Selection]]:
        """Return the rows of what came for each collector that gets any, and count those that it does not get."""
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
        """Let each destination learn anew."""
        for served in self._served.values():
            served.destination.refresh()

    def troubled(self, now: float) -> Iterator[tuple[Client, Symptom]]:
        """Look at each collector, and yield those that have a trouble."""
        for served in self._served.values():
            destination = served.destination
            symptom = served.checkup.examine(served.account, now, unreachable=destination.unreachable)
            if symptom is not None:
                yield destination.client, symptom

    def accounts(self) -> Accounts:
        """One account a collector."""
        return {f"collector/{name}": self._account(served) for name, served in self._served.items()}

    def _account(self, served: Served[D]) -> dict[str, int]:
        # What was offered is the same for all who want a stream, so nothing is counted for who gets nothing of a batch.
        client = served.destination.client
        offered = self._of_streams(self._routed, client) - served.unseen
        account = {**served.account, OFFERED: offered}
        if not takes_all(client):
            account[FILTERED] = offered - served.passed
        return {**account, EXPECTED: self._of_streams(self._published, client) - served.baseline}

    def close(self) -> None:
        """Let go of all of them."""
        for served in self._served.values():
            served.destination.close()
        self._served = {}
