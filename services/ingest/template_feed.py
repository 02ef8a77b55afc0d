"""A stream's templates on the bus: all that are kept, to each new subscriber, and those that have just come."""

import time
from collections.abc import Collection, Iterator, Sequence
from typing import Final

from services.ingest.flows.exporters import ExporterTracker
from services.ingest.flows.template_cache import Ready
from shared.bus.bodies.template_messages import Renewals, TemplateDatagram, Templates, renewals_topic, templates_topic
from shared.bus.zmq_sockets import Publisher

MAX_DATAGRAMS: Final = 1024
MAX_BYTES: Final = 256 << 10
"""Datagrams of a message, and their bytes unless it is one alone: senders of copies handle a message at a time."""


class TemplateFeed:
    """Publishes the templates of one stream."""

    def __init__(self, stream: str, publisher: Publisher) -> None:
        self._stream = stream
        self._publisher = publisher
        self._topic, self._renewals_topic = templates_topic(stream), renewals_topic(stream)
        self.owing = False
        """True while subscribers wait for an answer that the bus did not take."""

    def greet(self, prefixes: Collection[str], exporters: ExporterTracker | None) -> None:
        """Answer new subscribers; let renewals' numbers begin anew where somebody subscribes to these.

        Those who get them may have had other datagrams of an exporter before: numbers must not fall.
        """
        if exporters and any(self._renewals_topic.startswith(prefix) for prefix in prefixes):
            exporters.number_aside_anew()
        if self.owing or any(self._topic.startswith(prefix) for prefix in prefixes):
            self._answer(exporters)

    def _answer(self, exporters: ExporterTracker | None) -> None:
        """Publish all that is kept, in pieces, also if it is nothing. What the bus refuses is owed, all of it."""
        pieces = list(_pieces(exporters.kept_templates(time.time_ns()) if exporters else []))
        self.owing = not all(
            self._publisher.publish(self._topic, Templates(self._stream, number, len(pieces), piece))
            for number, piece in enumerate(pieces)
        )

    def observe(self, exporters: ExporterTracker) -> None:
        """Publish renewals that the last datagrams have brought, before these; what the bus refuses is owed.

        None are kept while nobody subscribes.
        """
        reader = exporters.templates
        reader.renewing = self._publisher.wanted(self._renewals_topic)
        if reader.renewals and not reader.renewing:
            reader.renewals.clear()
        for piece in list(_pieces(reader.renewals)) if reader.renewals else ():
            if not self._publisher.publish(self._renewals_topic, Renewals(self._stream, piece)):
                break
            del reader.renewals[: len(piece)]


def _pieces(ready: Sequence[Ready]) -> Iterator[list[TemplateDatagram]]:
    """Yield datagrams in messages, at least one."""
    piece: list[TemplateDatagram] = []
    size = 0
    for each in ready:
        size += len(each.payload)
        if piece and (size > MAX_BYTES or len(piece) == MAX_DATAGRAMS):
            yield piece
            piece, size = [], len(each.payload)
        piece.append(TemplateDatagram(*each))
    yield piece
