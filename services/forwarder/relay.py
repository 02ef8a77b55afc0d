"""Sends copies by plain UDP, from our own address: batches to plans, plans to outlets."""

from collections import Counter
from typing import ClassVar

import numpy as np

from services.forwarder.outlet import Outlet
from services.forwarder.plan import SendPlan
from shared.batch import Indices
from shared.copying import CopyService
from shared.gathering import Gathered
from shared.registry import Client, Source
from shared.routing import Selection
from shared.settings import Settings


class Relay(CopyService[Outlet]):
    """Serves the collectors whose `source` is `relay`."""

    source: ClassVar[Source] = "relay"

    def __init__(self, name: str, settings: Settings) -> None:
        super().__init__(name, settings)
        self._plan = SendPlan()

    def reach(self, client: Client, account: Counter[str]) -> Outlet:
        """Give a collector a socket of its own."""
        return Outlet(client, self.settings.forwarder, account)

    def send(self, batch: Gathered, routed: list[tuple[Outlet, Selection]]) -> None:
        """Give each collector its rows. Collectors that get the same rows by the same segments share the plan."""
        shared: dict[tuple[int, int], tuple[Selection, list[Outlet]]] = {}
        for outlet, selection in routed:
            key = id(selection), outlet.largest_segment
            shared.setdefault(key, (selection, []))[1].append(outlet)
        for (_, largest_segment), (selection, outlets) in shared.items():
            rows = len(batch) if selection.indices is None else len(selection.indices)
            if not rows:
                continue
            self._plan.build(batch, selection.indices, largest_segment)
            behind = [(outlet, sent) for outlet in outlets if (sent := outlet.send(self._plan)) < rows]
            for outlet, sent in behind:
                self._send_rest(batch, selection.indices, sent, outlet)

    def _send_rest(self, batch: Gathered, indices: Indices | None, sent: int, outlet: Outlet) -> None:
        """Send what is left after segments were refused."""
        rest = range(len(batch))[sent:] if indices is None else indices[sent:]
        self._plan.build(batch, np.asarray(rest, np.intp), outlet.largest_segment)
        outlet.send(self._plan)
