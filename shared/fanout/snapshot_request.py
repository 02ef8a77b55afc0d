"""The request for the whole registry: a subscription to its topic, which the gateway answers with all of it."""

import time

from shared.bus.messages import REGISTRY_TOPIC
from shared.bus.zmq_sockets import Subscriber


class SnapshotRequest:
    """Asks for the whole registry, since a change was lost; once a second at most, and a second after the start."""

    def __init__(self, subscriber: Subscriber) -> None:
        self._subscriber = subscriber
        self._asked_at = time.monotonic()

    def ask(self) -> None:
        """Subscribe anew, unless that was done a moment ago."""
        if time.monotonic() >= self._asked_at + 1.0:
            self._asked_at = time.monotonic()
            self._subscriber.unsubscribe(REGISTRY_TOPIC)
            self._subscriber.subscribe(REGISTRY_TOPIC)
