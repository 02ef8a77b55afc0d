"""Sends collectors what is next of the past; one that is away gets one datagram at a time, until it is back."""

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain, groupby
from operator import itemgetter
from typing import Final, Generic

import numpy as np

from shared.bus.continuity import Position, Worker
from shared.client import Place
from shared.datagrams.gathered import Gathered
from shared.datagrams.routing import Selection
from shared.fanout.catch_up.absences import put_off, signs, unsent
from shared.fanout.catch_up.copied_meanwhile import CopiedMeanwhile, Outcomes
from shared.fanout.catch_up.journal_questions import Pursued
from shared.fanout.catch_up.past_templates import PastTemplates
from shared.fanout.catch_up.pursuit import Step
from shared.fanout.catch_up.shares_meanwhile import Sharing
from shared.fanout.catch_up.window import Numbered, Window
from shared.fanout.collectors import Collectors
from shared.fanout.served_collector import D, count_received_before
from shared.fanout.templates import TemplateDelivery
from shared.ledger.counters import PERHAPS_TWICE

STEP_ROWS: Final = 128
"""Datagrams that a collector gets in a row: half of what the smallest receive buffer holds."""
BURST_SECONDS: Final = 0.02
"""A sender that was busy for so long makes up for it."""
ANSWER_SECONDS: Final = 0.5
"""A datagram that was not refused for so long has arrived."""
AGAIN_SECONDS: Final = 0.5
"""Time until one that is away is tried again."""


class PastSender(Generic[D]):
    """Takes the steps of pursuits, several in one send: batches may be small, and each send has its cost.

    `paces` counts by name the datagrams of the past that were sent since a report. `pursuits` are all that there are;
    `put_away` is told of a collector that does not get what it is sent, and takes it back on all its streams. `keep`
    keeps the places that they have reached for the next process.
    """

    def __init__(
        self,
        collectors: Collectors[D],
        send: Callable[[Gathered, list[tuple[D, Selection]]], None],
        templates: TemplateDelivery[D],
        positions: Callable[[str], Mapping[Worker, Position]],
        pursuits: Iterable[Pursued],
        put_away: Callable[[Iterable[str]], None],
        keep: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.paces: Counter[str] = Counter()
        self._collectors = collectors
        self._send = send
        self._templates = templates
        self._positions = positions
        self._pursuits = pursuits
        self._put_away = put_away
        self._keep = keep
        self._clock = clock
        self._allowed_at = clock()

    def note_live(self, catching_up: Iterable[Pursued], live: Numbered, joining: Collection[str]) -> None:
        """Note who shares a live batch with those that catch up, and what rules have copied to these.

        The rules served them a moment ago.
        """
        self._collectors.past.note_live(live, joining)
        for pursued in catching_up if live.batch.generations is not None else ():
            if pursued.pursuit.stream == live.batch.stream and pursued.name in self._collectors:
                client = self._collectors[pursued.name].destination.client
                pursued.copied.note(live, self._collectors.rules.entries_for(client, live.batch))

    def note_away(self, pursued: Pursued) -> None:
        """Note that a collector is away: it is tried in a while, and may have lost all templates by then."""
        if pursued.away:
            pursued.templates.put_back()
        else:
            self.ask_templates(pursued)
        pursued.away, pursued.last = True, []
        pursued.try_at = self._clock() + AGAIN_SECONDS

    def ask_templates(self, pursued: Pursued) -> None:
        """Ask for the templates that a collector may need before what comes next."""
        pursued.templates = PastTemplates()
        self._templates.ask(pursued.name, pursued.pursuit.stream)

    def send_rest(self, pursued: Pursued) -> None:
        """Send one that is level the templates that it lacks: of exporters not in the past, and those of late."""
        self._templates.send(pursued.pursuit.stream, pursued.templates.pop_rest(), pursued.name)
        self._templates.end_past(pursued.name, pursued.pursuit.stream)

    def allow(self, pursued: Iterable[Pursued], per_second: float, now: float) -> None:
        """Let collectors have as many datagrams as `per_second`, or a pace of their own, gives them until now."""
        elapsed, self._allowed_at = now - self._allowed_at, now
        for each in pursued:
            pace = max(per_second, each.pace)
            each.allowance = min(each.allowance + elapsed * pace, max(1.0, BURST_SECONDS * pace))

    def send_due(self, pursued: Pursued, window: Window, followed: Mapping[Worker, Position]) -> bool:
        """Send a collector what comes next, `STEP_ROWS` at most; return whether there is more."""
        destination = self._collectors[pursued.name].destination
        if pursued.away and not self._is_back(pursued):
            return False
        if destination.held:
            return self._stays(pursued)
        if pursued.last and not pursued.away and self._clock() >= pursued.try_at:
            if not self._hears_nothing(pursued):
                return False
            pursued.last = []
        if pursued.allowance < 1:
            return True
        most = 1 if pursued.away else min(STEP_ROWS, int(pursued.allowance))
        steps = self._next_steps(pursued, window, followed, most)
        if step := next(steps, None):
            return self._try(pursued, chain((step,), steps)) and not pursued.away
        self._stays(pursued)
        return False

    def _next_steps(
        self, pursued: Pursued, window: Window, followed: Mapping[Worker, Position], most: int
    ) -> Iterator[Step]:
        """Yield steps over `most` datagrams in all; each is to be advanced by before the next one is asked for.

        Behind the first none has anything missing before it: taken back, that would be missing twice.
        """
        first = True
        while most > 0 and (step := pursued.pursuit.next_step(window, followed, most)) and (first or not step.missing):
            most, first = most - len(step.batch or ()), False
            yield step

    def _is_back(self, pursued: Pursued) -> bool:
        """Return whether one that was away may be sent to: a first datagram, and more once that was not refused."""
        if self._clock() < pursued.try_at:
            return False
        destination = self._collectors[pursued.name].destination
        destination.seek()
        if not self._stays(pursued) or destination.unreachable:
            pursued.try_at = self._clock() + AGAIN_SECONDS
            return False
        pursued.away = not pursued.last  # else its first datagram has arrived
        return True

    def _try(self, pursued: Pursued, steps: Iterable[Step]) -> bool:
        """Take steps, and take them back if the collector is found to be away; return whether it is not."""
        served = self._collectors[pursued.name]
        if not self._hears_nothing(pursued):
            return False
        pursued.signs, pursued.unsent = signs(served.account), unsent(served.account)
        pursued.last = self.perform(pursued, steps)
        pursued.try_at = self._clock() + ANSWER_SECONDS
        return self._stays(pursued)

    def _hears_nothing(self, pursued: Pursued) -> bool:
        """Return whether the network tells nothing against the last steps' datagrams; else their collector is away."""
        self._collectors[pursued.name].destination.read_errors()
        return self._stays(pursued)

    def _stays(self, pursued: Pursued) -> bool:
        """Return whether the last steps' datagrams have arrived, as far as is known; else their collector is away."""
        served = self._collectors[pursued.name]
        if not pursued.last or not served.destination.client.catch_up:
            return True
        waits_in_vain = bool(served.destination.held) and served.destination.unreachable
        if signs(served.account) <= pursued.signs and not waits_in_vain:
            return True
        self._put_away([pursued.name])
        return False

    def take_back(self, name: str) -> None:
        """Take back the last steps on each stream of a collector that is away, since its streams share what waits."""
        served, pursuits = self._collectors[name], [each for each in self._pursuits if each.name == name]
        before = unsent(served.account)
        for each in pursuits:
            before &= each.unsent if each.last else before
        put_off(served, before)
        for each in pursuits:
            followed = self._positions(each.pursuit.stream)
            owed_again = sum(each.pursuit.rewind(place, followed) for place in reversed(each.last))
            if each.last:
                each.question = None  # its answer is what comes behind the place that was left
            if owed_again:
                self._collectors.past.count_discovered(name, owed_again)
            self.note_away(each)

    def perform(self, pursued: Pursued, steps: Iterable[Step]) -> list[Place]:
        """Send the datagrams of steps together; return the places at which the steps began.

        A process that is killed in between leaves at most these unsure.
        """
        past, places, templates = self._collectors.past, [], []
        missing = expired = 0
        taken: list[tuple[Sharing, Numbered]] = []
        for step in steps:
            places.append(pursued.pursuit.place(step))
            if step.discovered:
                past.count_discovered(pursued.name, step.discovered)
            pursued.pursuit.advance(step)
            missing, expired = missing + step.missing, expired + step.expired
            if step.batch is not None and len(step.batch):
                templates += pursued.templates.pop_for(step.batch)
                rows = step.numbered._replace(total=step.stop - len(step.batch), batch=step.batch)
                taken += past.shared(pursued.name, rows)
        self._keep()  # before what has become of them is counted: from the place before they would be counted once more
        past.count_unread(pursued.name, missing, expired)
        if taken:
            self._templates.send(pursued.pursuit.stream, templates, pursued.name)
            pursued.allowance -= len(templates)
            for sharing, together in groupby(taken, itemgetter(0)):
                self._send_together(pursued, sharing, [rows for _, rows in together])
        return places

    def _send_together(self, pursued: Pursued, sharing: Sharing, taken: Sequence[Numbered]) -> None:
        batch = Gathered([each.batch for each in taken])
        pursued.allowance -= len(batch)
        self.paces[pursued.name] += len(batch)
        outcomes = _outcomes(pursued.copied, taken)
        if routed := self._collectors.past.route_past(pursued.name, batch, sharing, outcomes):
            if pursued.twice_until_ns:
                self._collectors[pursued.name].account[PERHAPS_TWICE] += count_received_before(
                    pursued.twice_until_ns, batch, routed[0][1]
                )
            self._send(batch, routed)


def _outcomes(copied: CopiedMeanwhile, taken: Sequence[Numbered]) -> Outcomes | None:
    """Return what rules have made already of rows; None: all are owed."""
    found = [copied.outcomes(each.worker, each.total, each.end) for each in taken]
    if all(each is None for each in found):
        return None
    return np.concatenate(
        [np.zeros(len(rows.batch), np.uint8) if each is None else each for each, rows in zip(found, taken, strict=True)]
    )
