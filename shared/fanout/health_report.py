"""Health on the bus: collectors with a trouble, or losses; told at once, to late subscribers, and each second.

The list is complete each time, so the next one makes up for a lost one. Without collectors there is nothing to repeat.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterable

from shared.bus.bodies.fields import MAX_NUMBER
from shared.bus.bodies.health_message import Health, Troubled
from shared.bus.messages import health_topic
from shared.bus.pieces import cut
from shared.bus.zmq_sockets import Publisher
from shared.client import Client, Source, Trouble
from shared.fanout.health import EXAMINE_SECONDS, Symptom
from shared.process.lifecycle import next_tick

REPEAT_SECONDS = 1.0
_TROUBLED_SIZE = 48
"""The most bytes that one takes in a message, without its name."""


class HealthReporter:
    """Publishes the collectors of a source that have a trouble, or have lost datagrams."""

    def __init__(self, publisher: Publisher, source: Source) -> None:
        self._publisher = publisher
        self._source = source
        self._topic = health_topic(source)
        self._reports = itertools.count(1)
        self._told: list[tuple[str, int, Trouble | None]] = []
        self._tell_at = 0.0
        self.due_at = 0.0

    def asked_for(self, prefixes: Iterable[str]) -> bool:
        """Return whether one of these new subscriptions is for this report."""
        asked = any(self._topic.startswith(prefix) for prefix in prefixes)
        if asked:
            self._tell_at = 0.0
        return asked

    def hasten(self) -> None:
        """Note that copies are sent again: examine the collectors in half a second at the latest."""
        self.due_at = min(self.due_at, next_tick(time.monotonic(), EXAMINE_SECONDS))

    def report(
        self,
        look: Callable[[float], Iterable[tuple[Client, Symptom | None, int]]],
        *,
        flowing: bool = True,
        idle: bool = False,
        serving: bool = True,
    ) -> None:
        """Examine the collectors; publish their troubles if they differ from the last report or a second has passed.

        While no copies are `flowing` nothing is published: by that silence the gateway finds that collectors wait. An
        `idle` service, which has sent nothing since the last report, examines them each second, others twice as often.
        One that is not `serving` has no collectors.
        """
        now = time.monotonic()
        troubled = [_troubled(client, symptom, lost, now) for client, symptom, lost in look(now)]
        rests = idle and not any(each.trouble for each in troubled)
        self.due_at = next_tick(now, REPEAT_SECONDS if rests else EXAMINE_SECONDS)
        if serving:
            self._tell_at = min(self._tell_at, self.due_at)
        found = [(each.name, each.generation, each.trouble) for each in troubled]
        due = found != self._told or now >= self._tell_at
        if not (due and flowing and self._publisher.wanted(self._topic)):
            return
        self._told, self._tell_at = found, next_tick(now, REPEAT_SECONDS) if serving else math.inf
        pieces, report = cut(troubled, _size_of), next(self._reports)
        for number, piece in enumerate(pieces):
            self._publisher.publish(self._topic, Health(self._source, report, number, len(pieces), piece))


def _troubled(client: Client, symptom: Symptom | None, lost: int, now: float) -> Troubled:
    trouble, age_ms = (symptom.trouble, max(0, int((now - symptom.since) * 1000))) if symptom else (None, 0)
    return Troubled(client.name, client.generation, trouble, age_ms, min(lost, MAX_NUMBER))


def _size_of(troubled: Troubled) -> int:
    return 4 * len(troubled.name) + _TROUBLED_SIZE
