"""Sends copies by plain UDP, from our own address: batches to plans, plans to outlets."""

from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from typing import ClassVar

import numpy as np

from services.forwarder.outlet import Outlet
from services.forwarder.plan import SendPlan
from shared.batch import Indices
from shared.copying import CopyService
from shared.crew import Crew
from shared.gathering import Gathered, portions
from shared.registry import Client, Source
from shared.routing import Selection
from shared.settings import Settings

Part = tuple[Indices | None, list[Outlet]]
"""Rows of a batch, None for all, and who gets them."""


class Relay(CopyService[Outlet]):
    """Serves the collectors whose `source` is `relay`."""

    source: ClassVar[Source] = "relay"

    def __init__(self, name: str, settings: Settings) -> None:
        super().__init__(name, settings)
        self._plan = SendPlan()
        self._crew = Crew()

    def reach(self, client: Client, account: Counter[str]) -> Outlet:
        """Give a collector a socket of its own."""
        return Outlet(client, self.settings.forwarder, account)

    def send(self, batch: Gathered, routed: list[tuple[Outlet, Selection]]) -> None:
        """Give each collector its rows. Who gets the same ones shares a part of a plan; parts share the planning."""
        by_segment: dict[int, dict[int, tuple[Selection, list[Outlet]]]] = {}
        for outlet, selection in routed:
            wanted = by_segment.setdefault(outlet.largest_segment, {})
            wanted.setdefault(id(selection), (selection, []))[1].append(outlet)
        for largest_segment, selections in by_segment.items():
            parts: list[Part] = [(selection.indices, outlets) for selection, outlets in selections.values()]
            whole = [[part] for part in parts if part[0] is None]
            for together in (*whole, *portions([part for part in parts if _rows_of(part)], _rows_of)):
                self._transmit(batch, together, largest_segment)

    def _transmit(self, batch: Gathered, parts: list[Part], largest_segment: int) -> None:
        every = [indices for indices, _ in parts]
        indices = every[0] if len(every) == 1 else np.concatenate([each for each in every if each is not None])
        sizes = [len(batch) if each is None else len(each) for each in every]
        self._plan.build(batch, indices, largest_segment, [0, *accumulate(sizes[:-1])])
        tasks = [(outlet, part) for part, (_, outlets) in enumerate(parts) for outlet in outlets]
        behind = [each for some in self._crew.share(self._send_to, tasks, self._plan.rows) for each in some]
        for outlet, rest in behind:  # segments were refused
            self._plan.build(batch, rest, outlet.largest_segment)
            outlet.send(self._plan)

    def _send_to(self, _member: int, tasks: Sequence[tuple[Outlet, int]]) -> list[tuple[Outlet, Indices]]:
        """Send outlets their parts; return those that have not sent all of it, and their rows that are left."""
        sent = [(outlet, part, outlet.send(self._plan, part)) for outlet, part in tasks]
        plan = self._plan
        return [(outlet, plan.rest(rows, part)) for outlet, part, rows in sent if rows < plan.rows_of(part)]


def _rows_of(part: Part) -> int:
    return 0 if part[0] is None else len(part[0])
