"""The collectors that one service sends copies to: their destinations, the routes to them, and the account of each."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from shared.gathering import Gathered
from shared.ledger import EXPECTED, FILTERED, MISSED, OFFERED, SAMPLED_OUT, SHARED_OUT, Accounts
from shared.registry import Client
from shared.routing import Router, Selection


class Destination(Protocol):
    """How one collector is reached."""

    client: Client

    def refresh(self) -> None:
        """Learn anew, each second, what may have changed on the way there."""

    def close(self) -> None:
        """Let go of what is held for it."""


D = TypeVar("D", bound=Destination)


@dataclass(slots=True)
class Served(Generic[D]):
    """A collector being served. `baseline`: datagrams that its streams had carried when it signed up."""

    destination: D
    account: Counter[str]
    baseline: int


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
        self._streams = tuple(streams)
        self._published = published
        self._reach = reach
        self._served: dict[str, Served[D]] = {}
        self._router = Router()

    def replace(self, clients: Iterable[Client]) -> None:
        """Serve these from now on; one that did not change keeps its destination and its account."""
        kept: dict[str, Served[D]] = {}
        for client in clients:
            known = self._served.get(client.name)
            if known and known.destination.client == client:
                kept[client.name] = self._served.pop(client.name)
            else:
                account: Counter[str] = Counter()
                kept[client.name] = Served(self._reach(client, account), account, self._published_to(client))
        self.close()
        self._served = kept
        self._router.replace(served.destination.client for served in kept.values())

    def streams_wanted(self) -> set[str]:
        """The streams that any of them wants."""
        clients = [served.destination.client for served in self._served.values()]
        return {name for name in self._streams for client in clients if client.wants(name)}

    def _published_to(self, client: Client) -> int:
        return sum(count for stream, count in self._published.items() if client.wants(stream))

    def miss(self, stream: str, missed: int) -> None:
        """Count datagrams of a stream that the bus lost for each collector that would have been offered them."""
        for route in self._router.routes(stream):
            self._served[route.client.name].account[MISSED] += missed

    def route(self, batch: Gathered) -> list[tuple[D, Selection]]:
        """Return each collector's rows of what came, and count those that it does not get."""
        routed = []
        for client, selection in self._router.route(batch):
            served = self._served[client.name]
            _count(served.account, selection, len(batch))
            routed.append((served.destination, selection))
        return routed

    def refresh(self) -> None:
        """Let each destination learn anew. Due every second."""
        for served in self._served.values():
            served.destination.refresh()

    def accounts(self) -> Accounts:
        """One account a collector."""
        return {
            f"collector/{name}": {
                **served.account,
                EXPECTED: self._published_to(served.destination.client) - served.baseline,
            }
            for name, served in self._served.items()
        }

    def close(self) -> None:
        """Let go of all of them."""
        for served in self._served.values():
            served.destination.close()
        self._served = {}


def _count(account: Counter[str], selection: Selection, rows: int) -> None:
    account[OFFERED] += rows
    if selection.indices is not None:
        account[FILTERED] += selection.filtered
        account[SHARED_OUT] += selection.shared_out
        account[SAMPLED_OUT] += selection.sampled_out
