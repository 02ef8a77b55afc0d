"""Sends copies by plain UDP, from our own address: batches to plans, plans to outlets."""

import math
import time
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from typing import ClassVar, Final

import numpy as np

from services.forwarder.destination import Outlet
from services.forwarder.few import Few, few_of
from services.forwarder.plan import SendPlan
from shared.client import Client, Source
from shared.datagrams.batch import Indices
from shared.datagrams.gathered import Gathered, portions
from shared.datagrams.routing import Selection
from shared.fanout.send_threads import SendThreads
from shared.fanout.service import CopyService
from shared.settings.model import Settings

Part = tuple[Indices | None, list[Outlet]]
"""Rows of a batch, None for all, and who gets them."""
RETRY_SECONDS: Final = (0.0005, 0.016)
"""Between looks whether there is room again, twice as long after each in vain: an interface's queue tells nobody."""


class Relay(CopyService[Outlet]):
    """Serves the collectors whose `source` is `relay`."""

    source: ClassVar[Source] = "relay"

    def __init__(self, name: str, settings: Settings) -> None:
        super().__init__(name, settings, settings.forwarder)
        self._plan = SendPlan()
        self._crew = SendThreads()
        self._stalled: dict[Outlet, tuple[float, float]] = {}
        """Those for which something waits: seconds between tries, and when the next one is due."""

    def reach(self, client: Client, account: Counter[str]) -> Outlet:
        """Give a collector a socket of its own."""
        return Outlet(client, self.settings.forwarder, account, self.held)

    def send(self, batch: Gathered, routed: list[tuple[Outlet, Selection]]) -> None:
        """Give each collector its rows. Who gets the same ones shares a part of a plan; parts share the planning."""
        routed = self._send_few(batch, routed)
        if not routed:
            return
        by_segment: dict[int, dict[int, tuple[Selection, list[Outlet]]]] = {}
        for outlet, selection in routed:
            if outlet.held and not self._release(outlet, time.monotonic()):
                outlet.held.hold(batch, selection.indices)
                continue
            wanted = by_segment.setdefault(outlet.largest_segment, {})
            wanted.setdefault(id(selection), (selection, []))[1].append(outlet)
        for largest_segment, selections in by_segment.items():
            parts: list[Part] = [(selection.indices, outlets) for selection, outlets in selections.values()]
            whole = [[part] for part in parts if part[0] is None]
            for together in (*whole, *portions([part for part in parts if _rows_of(part)], _rows_of)):
                self._transmit(batch, together, largest_segment)

    def _send_few(self, batch: Gathered, routed: list[tuple[Outlet, Selection]]) -> list[tuple[Outlet, Selection]]:
        """Send collectors their rows where these are few and nothing hinders that; return what is left to be sent."""
        planned: dict[tuple[int, int], Few | None] = {}
        left = []
        for outlet, selection in routed:
            key = (id(selection), outlet.largest_segment)
            if key not in planned:
                planned[key] = few_of(batch, selection.indices, outlet.largest_segment)
            few = planned[key]
            if few is None or outlet.held:
                left.append((outlet, selection))
            elif (sent := outlet.send_few(few)) < (count := sum(few.rows)):
                rows = selection.indices
                rest = np.arange(sent, count) if rows is None else rows[sent:]
                left.append((outlet, Selection(rest)))
        return left

    def _transmit(self, batch: Gathered, parts: list[Part], largest_segment: int) -> None:
        every = [indices for indices, _ in parts]
        indices = every[0] if len(every) == 1 else np.concatenate([each for each in every if each is not None])
        sizes = [len(batch) if each is None else len(each) for each in every]
        self._plan.build(batch, indices, largest_segment, [0, *accumulate(sizes[:-1])])
        tasks = [(outlet, part) for part, (_, outlets) in enumerate(parts) for outlet in outlets]
        behind = [each for some in self._crew.share(self._send_to, tasks, self._plan.rows) for each in some]
        for outlet, rest in behind:
            left = rest if outlet.full else self._send_rest(batch, outlet, rest)
            if len(left):
                outlet.held.hold(batch, left)
                self._stalled.setdefault(outlet, (RETRY_SECONDS[0], 0.0))

    def _send_rest(self, batch: Gathered, outlet: Outlet, rows: Indices) -> Indices:
        """Send rows to one collector, without segments where those are refused; return what there is no room for."""
        while len(rows):
            self._plan.build(batch, rows, outlet.largest_segment)
            rows = self._plan.rest(outlet.send(self._plan))
            if outlet.full:
                break
        return rows

    def _release(self, outlet: Outlet, now: float) -> bool:
        """Send what waits for a collector, oldest first, if it is time to try; whether all of it has left."""
        first, longest = RETRY_SECONDS
        pause, due_at = self._stalled.get(outlet, (first, 0.0))
        while outlet.held and now >= due_at:
            held = outlet.held.take()
            rows = np.arange(len(held.batch)) if held.rows is None else held.rows
            if len(left := self._send_rest(held.batch, outlet, rows)):
                outlet.held.put_back(held, left)
                pause = min(2 * pause, longest) if len(left) == len(rows) else first
                self._stalled[outlet] = pause, now + pause
                break
        return not outlet.held

    def work(self) -> float:
        """Send what waits if there is room by now; drop what has waited too long."""
        now = time.monotonic()
        for outlet in list(self._stalled):
            outlet.held.expire(now)
            if self._release(outlet, now):
                del self._stalled[outlet]
        return max(0.0, min((due_at for _, due_at in self._stalled.values()), default=math.inf) - now)

    def _send_to(self, _member: int, tasks: Sequence[tuple[Outlet, int]]) -> list[tuple[Outlet, Indices]]:
        """Send outlets their parts; return those that have not sent all of it, and their rows that are left."""
        sent = [(outlet, part, outlet.send(self._plan, part)) for outlet, part in tasks]
        plan = self._plan
        return [(outlet, plan.rest(rows, part)) for outlet, part, rows in sent if rows < plan.rows_of(part)]


def _rows_of(part: Part) -> int:
    return 0 if part[0] is None else len(part[0])
