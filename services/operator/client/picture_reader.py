"""Pictures of the whole stack for a command: what `shared.monitoring` makes of all that the bus tells."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from services.operator.client.bus_reader import subscribed
from shared.bus.zmq_sockets import Subscriber
from shared.fanout.snapshot_request import SnapshotRequest
from shared.monitoring.observer import TOPICS, Observer
from shared.monitoring.picture import Picture
from shared.settings.model import Settings
from shared.settings.opt_in import asked_for

RATES_SECONDS: Final = 2.5
"""Each service reports at once, and then each second: in this time at least twice, and rates are known."""


class Watched:
    """The bus, observed for as long as `read` is called."""

    def __init__(self, subscriber: Subscriber, settings: Settings) -> None:
        self._subscriber, self._observer = subscriber, Observer(asked_for(settings))
        self._snapshot = SnapshotRequest(subscriber)
        self.socket = subscriber.socket
        """Readable when there is something to read."""

    def read(self) -> None:
        """Take in what has come."""
        while message := self._subscriber.receive():
            self._observer.note(message, time.monotonic())
        if self._observer.stale:
            self._snapshot.ask()

    def picture(self) -> Picture:
        """Return the picture as of now."""
        return self._observer.picture(time.monotonic())


@contextmanager
def watched(settings: Settings) -> Iterator[Watched]:
    """Watch the bus. OperatorError (69) when there is no broker."""
    first, *others = TOPICS
    with subscribed(settings, first) as subscriber:
        for topic in others:
            subscriber.subscribe(topic)
        yield Watched(subscriber, settings)


def picture_with_rates(settings: Settings) -> Picture:
    """Watch until rates are known, and return the picture. OperatorError (69) when there is no broker."""
    with watched(settings) as bus:
        end_at = time.monotonic() + RATES_SECONDS
        while (left := end_at - time.monotonic()) > 0:
            bus.socket.poll(int(left * 1000) + 1)
            bus.read()
        return bus.picture()
