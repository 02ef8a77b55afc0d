"""The registry on the bus: whole to every late subscriber, numbered changes after that, and who serves it asked back.

Nothing is left out for a subscriber that keeps up: what the bus does not take now waits in order, and when too much
waits, it is thrown away and the whole registry is sent instead.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

import msgspec

from services.gateway.registry import Registry
from shared.bus import Publisher, Requests, Subscriber
from shared.ledger import Accounts
from shared.registry import Client
from shared.status import Reporter
from shared.wire import (
    PIECE_SIZE,
    REGISTRY_TOPIC,
    SERVE_TOPIC,
    Message,
    RegistryChange,
    RegistrySnapshot,
    ServeReply,
    ServeRequest,
)

GATHER_SECONDS: Final = 0.002
"""Changes that follow one another faster are published together."""
WAITING_MAX: Final = 4096
"""Messages that may wait for the bus, before the whole registry is cheaper."""
ASK_AGAIN_SECONDS: Final = 1.0

_encode: Final = msgspec.msgpack.Encoder().encode


@dataclass(slots=True)
class _Question:
    """A `ServeRequest`, and what waits for its answer."""

    finished: list[Callable[[], None]] = field(default_factory=list)
    id: int = 0
    revision: int = 0


class Announcer:
    """Publishes the registry; `call_later(seconds, callback)` is the loop's."""

    def __init__(
        self,
        publisher: Publisher,
        subscriber: Subscriber,
        registry: Registry,
        serve_seconds: float,
        call_later: Callable[[float, Callable[[], None]], object],
    ) -> None:
        self._publisher = publisher
        self._subscriber = subscriber
        self._registry = registry
        self._serve_seconds = serve_seconds
        self._call_later = call_later
        self._requests = Requests(publisher.sender, publisher.boot)
        self._subscriber.subscribe(self._requests.topic)
        self._reporter = Reporter(publisher)
        self._waiting: deque[RegistrySnapshot | RegistryChange] = deque()
        self._owes_snapshot = False
        self._question: _Question | None = None
        self._served_by_someone = False
        self._woken = False
        self._flushed_at = self._asked_at = 0.0

    def wake(self) -> None:
        """Have `flush` called soon, and once for all changes that come close together."""
        if not self._woken:
            self._woken = True
            self._call_later(max(0.0, self._flushed_at + GATHER_SECONDS - time.monotonic()), self.flush)

    def ask_served(self, finished: Callable[[], None]) -> None:
        """Call `finished` once copies flow to every collector there is now, or when nobody said so in time."""
        if not self._publisher.wanted(SERVE_TOPIC):
            self._registry.note_unanswered(self._registry.commit())
            finished()
            return
        self._ask().finished.append(finished)
        self.wake()

    def flush(self) -> None:
        """Publish what has changed, and what the bus did not take before; see who has subscribed."""
        self._woken = False
        self._flushed_at = time.monotonic()
        self._note_subscriptions()
        while True:
            self._registry.commit()
            self._gather()
            self._publish()
            # Publishing may swallow the edge by which we would hear of a subscription.
            if not self._note_subscriptions():
                return

    def tick(self, accounts: Callable[[], Accounts]) -> None:
        """Do what time brings: deadlines, what waits for the bus, a question that nobody answered, the status."""
        self.take_replies()
        self._requests.expire()
        now = time.monotonic()
        if self._registry.unserved and self._served_by_someone and now >= self._asked_at + ASK_AGAIN_SECONDS:
            self._ask()
        self.flush()
        if now >= self._reporter.due_at:
            self._reporter.report(accounts)

    def take_replies(self) -> None:
        """Take every answer that has come."""
        while (message := self._subscriber.receive()) is not None:
            if isinstance(message.body, ServeReply):
                self._requests.answer(message.body.id, message)

    def _note_subscriptions(self) -> bool:
        """Whether a new subscription wants something of us now."""
        fresh = self._publisher.new_subscriptions()
        served_before, self._served_by_someone = self._served_by_someone, self._publisher.wanted(SERVE_TOPIC)
        if served_before and not self._served_by_someone:
            self._registry.forget_served()
        if self._reporter.asked_for(fresh):
            self._reporter.due_at = 0.0
        for_registry = any(REGISTRY_TOPIC.startswith(prefix) for prefix in fresh)
        if for_registry:
            self._waiting.clear()  # the snapshot takes its place
            self._owes_snapshot = True
        for_serving = any(SERVE_TOPIC.startswith(prefix) for prefix in fresh) and self._registry.collectors > 0
        if for_serving:
            self._ask()
        return for_registry or for_serving

    def _gather(self) -> None:
        changes = self._registry.take_changes()
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
        if self._question is not None:
            self._question.revision = self._registry.commit()
            body = ServeRequest(self._question.id, self._requests.topic, self._question.revision)
            if self._publisher.publish(SERVE_TOPIC, body):
                self._question = None

    def _snapshot(self) -> list[RegistrySnapshot]:
        revision = self._registry.commit()
        pieces = list(cut(entry.client for entry in self._registry.entries()))
        return [RegistrySnapshot(revision, number, len(pieces), piece) for number, piece in enumerate(pieces)]

    def _ask(self) -> _Question:
        """The question that goes out with the next flush."""
        if self._question is None:
            question = self._question = _Question()

            def answered(message: Message | None) -> None:
                self._answered(question, message)

            question.id = self._requests.open(self._serve_seconds, answered)
            self._asked_at = time.monotonic()
            self._call_later(self._serve_seconds + GATHER_SECONDS, self._requests.expire)
        return self._question

    def _answered(self, question: _Question, message: Message | None) -> None:
        if self._question is question:
            self._question = None  # it never got on the bus
        if message is not None and isinstance(message.body, ServeReply):
            self._registry.note_served(min(question.revision, message.body.revision))
        else:
            self._registry.note_unanswered(question.revision or self._registry.commit())
        for finished in question.finished:
            finished()


def cut(clients: Iterator[Client]) -> Iterator[list[Client]]:
    """Yield the clients in pieces of about `PIECE_SIZE` encoded bytes, at least one."""
    piece: list[Client] = []
    size = 0
    for client in clients:
        cost = len(_encode(client))
        if piece and size + cost > PIECE_SIZE:
            yield piece
            piece, size = [], 0
        piece.append(client)
        size += cost
    yield piece
