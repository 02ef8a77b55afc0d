"""Requests of the gateway to say when a revision of the registry is served, and their answers."""

import time
from collections.abc import Callable
from typing import Final

from shared.bus.messages import ServeReply, ServeRequest
from shared.bus.zmq_sockets import Publisher
from shared.fanout.registry_replica import RegistryReplica

MAX_WAITING: Final = 1024
"""Requests kept until copies flow; the gateway gives up on one long before there are this many."""
REQUEST_SECONDS: Final = 5.0
"""Time for the revision of a request to come; after it, the gateway that asked is gone."""


class ServeRequests:
    """The requests that wait for an answer; false when there are none."""

    def __init__(
        self, publisher: Publisher, replica: RegistryReplica, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._publisher = publisher
        self._replica = replica
        self._clock = clock
        self._waiting: list[tuple[float, int, ServeRequest]] = []

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def add(self, boot: int, request: ServeRequest) -> None:
        """Let a request of the gateway that was started as `boot` wait; one too many is dropped."""
        self._replica.expect(boot, request.revision)
        if len(self._waiting) < MAX_WAITING:
            self._waiting.append((self._clock() + REQUEST_SECONDS, boot, request))

    def answer(self, joining_since: float) -> None:
        """Answer those whose revision is served: the replica's is, its streams flow, and nobody of it is joining."""
        now, still_waiting = self._clock(), []
        for expires_at, boot, request in self._waiting:
            if self._replica.holds(boot, request.revision) and request.revision < joining_since:
                served = int(min(self._replica.revision, joining_since - 1))
                self._publisher.publish(request.reply, ServeReply(request.id, served))
            elif expires_at > now:
                still_waiting.append((expires_at, boot, request))
        self._waiting = still_waiting
