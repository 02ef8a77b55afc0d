"""The collectors we serve: their outlets, what each is sent of a batch, and the account of each."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from services.forwarder.outlet import Outlet
from services.forwarder.plan import SendPlan
from shared.batch import DatagramBatch, Indices
from shared.ledger import EXPECTED, FILTERED, MISSED, OFFERED, SAMPLED_OUT, SHARED_OUT, Accounts
from shared.registry import Client
from shared.routing import Router, Selection
from shared.settings import Forwarder


@dataclass(slots=True)
class Served:
    """A collector being served. `baseline`: datagrams that its streams had carried when it signed up."""

    outlet: Outlet
    account: Counter[str]
    baseline: int


class Collectors:
    """Every collector that has its copies from us. `published` counts each stream's datagrams (see `Streams`)."""

    def __init__(self, streams: Iterable[str], published: Mapping[str, int], settings: Forwarder) -> None:
        self._streams = tuple(streams)
        self._published = published
        self._settings = settings
        self._served: dict[str, Served] = {}
        self._router = Router()
        self._plan = SendPlan()

    def replace(self, clients: Iterable[Client]) -> None:
        """Serve these from now on; one that did not change keeps its socket and its account."""
        kept: dict[str, Served] = {}
        for client in clients:
            known = self._served.get(client.name)
            if known and known.outlet.client == client:
                kept[client.name] = self._served.pop(client.name)
            else:
                account: Counter[str] = Counter()
                outlet = Outlet(client, self._settings, account)
                kept[client.name] = Served(outlet, account, self._published_to(client))
        self.close()
        self._served = kept
        self._router.replace(served.outlet.client for served in kept.values())

    def streams_wanted(self) -> set[str]:
        """The streams that any of them wants."""
        return {name for name in self._streams for served in self._served.values() if served.outlet.client.wants(name)}

    def _published_to(self, client: Client) -> int:
        return sum(count for stream, count in self._published.items() if client.wants(stream))

    def miss(self, stream: str, missed: int) -> None:
        """Count datagrams of a stream that the bus lost for each collector that would have been offered them."""
        for route in self._router.routes(stream):
            self._served[route.client.name].account[MISSED] += missed

    def send(self, batch: DatagramBatch) -> None:
        """Give each collector its rows. Collectors that get the same rows by the same segments share the plan."""
        shared: dict[tuple[int, int], list[Served]] = {}
        selections: dict[int, Selection] = {}
        for client, selection in self._router.route(batch):
            served = self._served[client.name]
            _count(served.account, selection, len(batch))
            key = id(selection), served.outlet.largest_segment
            selections[key[0]] = selection
            shared.setdefault(key, []).append(served)
        for (number, largest_segment), group in shared.items():
            indices = selections[number].indices
            rows = len(batch) if indices is None else len(indices)
            if not rows:
                continue
            self._plan.build(batch, indices, largest_segment)
            behind = [(served, sent) for served in group if (sent := served.outlet.send(self._plan)) < rows]
            for served, sent in behind:
                self._send_rest(batch, indices, sent, served.outlet)

    def _send_rest(self, batch: DatagramBatch, indices: Indices | None, sent: int, outlet: Outlet) -> None:
        """Send what is left after segments were refused."""
        rest = range(len(batch))[sent:] if indices is None else indices[sent:]
        self._plan.build(batch, np.asarray(rest, np.intp), outlet.largest_segment)
        outlet.send(self._plan)

    def refresh(self) -> None:
        """Reconnect those that are not connected, and learn path MTUs anew."""
        for served in self._served.values():
            served.outlet.refresh()

    def accounts(self) -> Accounts:
        """One account a collector."""
        return {
            f"collector/{name}": {
                **served.account,
                EXPECTED: self._published_to(served.outlet.client) - served.baseline,
            }
            for name, served in self._served.items()
        }

    def close(self) -> None:
        """Close every socket."""
        for served in self._served.values():
            served.outlet.close()
        self._served = {}


def _count(account: Counter[str], selection: Selection, rows: int) -> None:
    account[OFFERED] += rows
    if selection.indices is not None:
        account[FILTERED] += selection.filtered
        account[SHARED_OUT] += selection.shared_out
        account[SAMPLED_OUT] += selection.sampled_out
