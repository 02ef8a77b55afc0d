"""Sends copies by plain UDP, from our own address: batches to plans, plans to destinations."""

import math
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import ClassVar, Final

import numpy as np

from services.forwarder.destination import Destination
from services.forwarder.few_rows import Few, few_of
from services.forwarder.mixed_rows import MixedRows, Vector, mixed_of
from services.forwarder.plan import SendPlan
from shared.client import Client, Source
from shared.datagrams.batch import Indices
from shared.datagrams.gathered import Gathered, portions
from shared.datagrams.routing import Selection
from shared.fanout.sending.send_threads import SendThreads
from shared.fanout.service import CopyService
from shared.net.queues import Queues
from shared.net.route_changes import RouteChanges
from shared.settings.model import Settings

Part = tuple[Indices | None, list[Destination]]
"""Rows of a batch, None for all, and the destinations that get them."""
RETRY_SECONDS: Final = (0.0005, 0.016)
"""Pauses between checks for room, doubled after each in vain: an interface's queue gives no signal."""


class ForwarderService(CopyService[Destination]):
    """Serves the collectors whose `source` is `relay`."""

    source: ClassVar[Source] = "relay"

    def __init__(self, name: str, settings: Settings) -> None:
        super().__init__(name, settings, settings.forwarder)
        self._plan = SendPlan()
        self._vector = Vector()
        self._threads = SendThreads()
        self._stalled: dict[Destination, tuple[float, float]] = {}
        """Collectors with waiting rows: seconds between tries, and the time of the next one."""
        self.route_changes = RouteChanges()
        self._queues = Queues()

    def reach(self, client: Client, account: Counter[str]) -> Destination:
        """Give a collector a socket of its own."""
        return Destination(client, self.settings.forwarder, account, self.held, self.route_changes, self._queues)

    def descriptors(self) -> Iterable[int]:
        """Return the descriptor that signals a changed route, where there is one."""
        return () if self.route_changes.blind else (self.route_changes.fileno(),)

    def send(self, batch: Gathered, routed: list[tuple[Destination, Selection]]) -> None:
        """Give each collector its rows.

        Collectors that get the same rows share a part of a plan; parts share the planning.
        """
        routed = self._send_few(batch, routed)
        if not routed:
            return
        by_segment: dict[int, dict[int, tuple[Selection, list[Destination]]]] = {}
        for destination, selection in routed:
            held, now = destination.held, time.monotonic()
            if (held and not self._release(destination, now)) or (held.paced_until and held.paced(now)):
                self._hold(batch, destination, selection.indices)
                continue
            wanted = by_segment.setdefault(destination.largest_segment, {})
            wanted.setdefault(id(selection), (selection, []))[1].append(destination)
        for largest_segment, selections in by_segment.items():
            parts: list[Part] = [(selection.indices, destinations) for selection, destinations in selections.values()]
            whole = [[part] for part in parts if part[0] is None]
            for together in (*whole, *portions([part for part in parts if _rows_of(part)], _rows_of)):
                self._transmit(batch, together, largest_segment)

    def _send_few(
        self, batch: Gathered, routed: list[tuple[Destination, Selection]]
    ) -> list[tuple[Destination, Selection]]:
        """Send collectors their rows where these are few and nothing hinders that; return what is left to be sent."""
        planned: dict[tuple[int, int], Few | MixedRows | None] = {}
        left = []
        for destination, selection in routed:
            key = (id(selection), destination.largest_segment)
            if key not in planned:
                planned[key] = few = few_of(batch, selection.indices, destination.largest_segment) or mixed_of(
                    batch, selection.indices, destination.largest_segment, self._vector
                )
                if few:
                    few.templates = batch.templates
            few = planned[key]
            if few is None or destination.held or destination.held.paced_until:
                left.append((destination, selection))
            elif (sent := destination.send_few(few)) < len(few.rows):
                left.append((destination, Selection(few.rest(sent, selection.indices))))
        return left

    def _transmit(self, batch: Gathered, parts: list[Part], largest_segment: int) -> None:
        every = [indices for indices, _ in parts]
        indices = every[0] if len(every) == 1 else np.concatenate([each for each in every if each is not None])
        sizes = [len(batch) if each is None else len(each) for each in every]
        self._plan.build(batch, indices, largest_segment, [0, *accumulate(sizes[:-1])])
        tasks = [(destination, part) for part, (_, destinations) in enumerate(parts) for destination in destinations]
        behind = [each for some in self._threads.share(self._send_to, tasks, self._plan.rows) for each in some]
        for destination, rest in behind:
            left = rest if destination.full else self._send_rest(batch, destination, rest)
            if len(left):
                self._hold(batch, destination, left)

    def _hold(self, batch: Gathered, destination: Destination, rows: Indices | None) -> None:
        destination.held.hold(batch, rows)
        self._stalled.setdefault(destination, (RETRY_SECONDS[0], 0.0))

    def _send_rest(self, batch: Gathered, destination: Destination, rows: Indices) -> Indices:
        """Send rows to one collector, without segments where those are refused; return the rows without room."""
        while len(rows):
            self._plan.build(batch, rows, destination.largest_segment)
            rows = self._plan.rest(destination.send(self._plan))
            if destination.full:
                break
        return rows

    def _release(self, destination: Destination, now: float) -> bool:
        """Send a collector's waiting rows, oldest first, if it is time to try; return whether all of them have left."""
        first, longest = RETRY_SECONDS
        if destination.held.paused:
            self._stalled[destination] = longest, now + longest
            return False
        pause, due_at = self._stalled.get(destination, (first, 0.0))
        while destination.held and now >= due_at:
            if destination.held.paced(now):
                self._stalled[destination] = first, destination.held.paced_until
                break
            held = destination.held.pop_oldest()
            rows = np.arange(len(held.batch)) if held.rows is None else held.rows
            if len(left := self._send_rest(held.batch, destination, rows)):
                destination.held.put_back(held, left)
                pause = min(2 * pause, longest) if len(left) == len(rows) else first
                self._stalled[destination] = pause, now + pause
                break
        return not destination.held

    def work(self) -> float:
        """Send waiting rows if there is room by now; drop those that have waited too long; note changed routes."""
        self.route_changes.read()
        now = time.monotonic()
        for destination in list(self._stalled):
            destination.held.expire(now)
            if not destination.held or self._release(destination, now):
                del self._stalled[destination]
        return max(0.0, min((due_at for _, due_at in self._stalled.values()), default=math.inf) - now)

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self.close()

    def close(self) -> None:
        """Close our own sockets; those of collectors close with them."""
        self.route_changes.close()
        self._queues.close()

    def _send_to(self, _member: int, tasks: Sequence[tuple[Destination, int]]) -> list[tuple[Destination, Indices]]:
        """Send destinations their parts; return those that have not sent all of it, and their remaining rows."""
        sent = [(destination, part, destination.send(self._plan, part)) for destination, part in tasks]
        plan = self._plan
        return [(destination, plan.rest(rows, part)) for destination, part, rows in sent if rows < plan.rows_of(part)]


def _rows_of(part: Part) -> int:
    return 0 if part[0] is None else len(part[0])
