"""Health on the bus: who sends copies tells which collectors have a trouble: at once, to late subscribers, each second.

The list is whole each time, so that one that the bus lost is made up for by the next.
"""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator

from shared.bus.messages import MAX_NUMBER, PIECE_SIZE, Health, Troubled, health_topic
from shared.bus.zmq_sockets import Publisher
from shared.client import Client, Source, Trouble
from shared.fanout.health import LOOK_SECONDS, Symptom
from shared.process.lifecycle import next_tick

TELL_SECONDS = 1.0
_TROUBLED_SIZE = 48
"""Bytes that one takes in a message at most, but for its name."""


class HealthReporter:
    """Publishes which collectors of a source have a trouble."""

    def __init__(self, publisher: Publisher, source: Source) -> None:
        self._publisher = publisher
        self._source = source
        self._topic = health_topic(source)
        self._reports = itertools.count(1)
        self._told: list[tuple[str, int, Trouble]] = []
        self._tell_at = 0.0
        self.due_at = 0.0

    def asked_for(self, prefixes: Iterable[str]) -> bool:
        """Whether one of these new subscriptions is for this."""
        asked = any(self._topic.startswith(prefix) for prefix in prefixes)
        if asked:
            self._tell_at = 0.0
        return asked

    def report(self, look: Callable[[float], Iterable[tuple[Client, Symptom]]]) -> None:
        """Look, and publish what is found, if that is another trouble than was told, or a second has passed."""
        now = time.monotonic()
        self.due_at = next_tick(now, LOOK_SECONDS)
        troubled = [_troubled(client, symptom, now) for client, symptom in look(now)]
        found = [(each.name, each.generation, each.trouble) for each in troubled]
        if not self._publisher.wanted(self._topic) or (found == self._told and now < self._tell_at):
            return
        self._told, self._tell_at = found, next_tick(now, TELL_SECONDS)
        pieces, report = list(_cut(troubled)), next(self._reports)
        for number, piece in enumerate(pieces):
            self._publisher.publish(self._topic, Health(self._source, report, number, len(pieces), piece))


def _troubled(client: Client, symptom: Symptom, now: float) -> Troubled:
    age_ms, count = max(0, int((now - symptom.since) * 1000)), min(symptom.count, MAX_NUMBER)
    return Troubled(client.name, client.generation, symptom.trouble, age_ms, count)


def _cut(troubled: Iterable[Troubled]) -> Iterator[list[Troubled]]:
    piece: list[Troubled] = []
    size = 0
    for each in troubled:
        cost = 4 * len(each.name) + _TROUBLED_SIZE
        if piece and size + cost > PIECE_SIZE:
            yield piece
            piece, size = [], 0
        piece.append(each)
        size += cost
    yield piece
