"""The registry on the bus: all of it to every new subscriber, then numbered changes, then a question who serves it.

Nothing is left out for a subscriber that keeps up: changes wait in order while the bus is full. When too many wait, the
whole registry replaces them.
"""

import contextlib
import time
from collections import deque
from collections.abc import Callable
from typing import Final

from services.gateway.bus.serving import CallLater, ServingQuery
from services.gateway.event_feed import EventFeed
from services.gateway.registry.changes import ignore
from services.gateway.registry.registry import Registry
from shared.bus.bodies.health_message import Health
from shared.bus.bodies.journal_messages import CATCH_UP_PREFIX, CatchUpReport
from shared.bus.bodies.nodes_message import NODES_TOPIC, Nodes
from shared.bus.bodies.packing import pack
from shared.bus.messages import (
    HEALTH_PREFIX,
    REGISTRY_TOPIC,
    RegistryChange,
    RegistrySnapshot,
    ServeReply,
    TransmitReply,
)
from shared.bus.pieces import cut
from shared.bus.status import Reporter
from shared.bus.zmq_sockets import Publisher, Requests, Subscriber
from shared.client import Source
from shared.ledger.accounts import Accounts
from shared.process.memory import Memory

GATHER_SECONDS: Final = 0.002
"""Changes that follow one another faster are published together."""
WAITING_MAX: Final = 4096
"""Messages that may wait for the bus, before the whole registry is cheaper."""


class Announcer:
    """Publishes the registry, and receives answers, including those to `requests` of others by the same publisher."""

    def __init__(
        self,
        publisher: Publisher,
        subscriber: Subscriber,
        requests: Requests,
        registry: Registry,
        feed: EventFeed,
        serve_seconds: float,
        call_later: CallLater,
        memory: Memory,
    ) -> None:
        self._feed = feed
        self._publisher = publisher
        self._subscriber = subscriber
        self._requests = requests
        self._registry = registry
        self._call_later = call_later
        self._queries = {
            source: ServingQuery(source, publisher, requests, registry, serve_seconds, call_later)
            for source in registry.serving
        }
        self._subscriber.subscribe(requests.topic)
        self._subscriber.subscribe(HEALTH_PREFIX)
        self._subscriber.subscribe(CATCH_UP_PREFIX)
        if registry.groups.owners.nodes:
            self._subscriber.subscribe(NODES_TOPIC)
        self._reporter = Reporter(publisher, memory)
        self._waiting: deque[RegistrySnapshot | RegistryChange] = deque()
        self._owes_snapshot = False
        self._woken = False
        self._flushed_at = 0.0

    def announce_soon(self) -> None:
        """Arrange for one call of `flush` soon, for all changes that come close together."""
        if not self._woken:
            self._woken = True
            self._call_later(max(0.0, self._flushed_at + GATHER_SECONDS - time.monotonic()), self.flush)

    def sends_copies(self, source: Source) -> bool:
        """Return whether a service is there that sends copies of this source."""
        return self._queries[source].possible

    def ask_served(self, source: Source, finished: Callable[[], None]) -> None:
        """Call `finished` once copies flow to every collector of `source`, or when no answer came in time."""
        self._queries[source].ask(finished)
        self.announce_soon()

    def flush(self) -> None:
        """Publish changes, to watchers and the bus, and messages that waited for the bus; note new subscriptions."""
        self._woken = False
        self._flushed_at = time.monotonic()
        self._feed.push_events()
        self._note_subscriptions()
        while True:
            self._registry.commit()
            self._gather()
            self._publish()
            # Publishing may swallow the edge that signals a subscription.
            if not self._note_subscriptions():
                return

    def tick(self, accounts: Callable[[], Accounts]) -> None:
        """Do what is due: deadlines, messages that wait for the bus, questions without an answer, the status."""
        self.receive_messages()
        self._registry.groups.owners.check()
        self._requests.expire()
        for query in self._queries.values():
            query.check()
        self.flush()
        self._feed.push_health()
        if time.monotonic() >= self._reporter.due_at:
            self._reporter.report(accounts)

    def receive_messages(self) -> None:
        """Receive every answer that has come, and the health of collectors."""
        while (message := self._subscriber.receive()) is not None:
            body = message.body
            if isinstance(body, ServeReply | TransmitReply):
                self._requests.answer(body.id, message)
            elif isinstance(body, Health):
                self._queries[body.source].note_heard()
                self._registry.note_health(message.envelope.boot, body)
            elif isinstance(body, CatchUpReport):
                self._note_behind(body)
            elif isinstance(body, Nodes):
                self._registry.groups.owners.note(body)

    def _note_behind(self, body: CatchUpReport) -> None:
        with contextlib.suppress(OSError):  # it can't be stored now, which the store has logged; it is told again
            self._registry.changes.make(lambda: self._registry.note_behind(body), ignore, ignore)
            self.announce_soon()

    def _note_subscriptions(self) -> bool:
        """Note new subscriptions; return whether one of them needs something now."""
        fresh = self._publisher.new_subscriptions()
        if self._reporter.asked_for(fresh):
            self._reporter.due_at = 0.0
        for_registry = any(REGISTRY_TOPIC.startswith(prefix) for prefix in fresh)
        if for_registry:
            self._waiting.clear()  # the snapshot replaces them
            self._owes_snapshot = True
        asked = [query.note_subscriptions(fresh) for query in self._queries.values()]
        return for_registry or any(asked)

    def _gather(self) -> None:
        changes = self._registry.pop_changes()
        if not self._publisher.wanted(REGISTRY_TOPIC):
            self._waiting.clear()
            self._owes_snapshot = False
        elif not self._owes_snapshot:
            self._waiting.extend(changes)
            if len(self._waiting) > WAITING_MAX:
                self._waiting.clear()
                self._owes_snapshot = True

    def _publish(self) -> None:
        if self._owes_snapshot:
            self._waiting.extend(self._snapshot())
            self._owes_snapshot = False
        while self._waiting:
            if not self._publisher.publish(REGISTRY_TOPIC, self._waiting[0]):
                return
            self._waiting.popleft()
        for query in self._queries.values():
            query.publish()

    def _snapshot(self) -> list[RegistrySnapshot]:
        revision = self._registry.commit()
        pieces = cut(map(self._registry.groups.for_bus, self._registry.entries()), lambda client: len(pack(client)))
        return [RegistrySnapshot(revision, number, len(pieces), piece) for number, piece in enumerate(pieces)]
