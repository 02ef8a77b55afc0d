"""Questions to the services that send copies: up to which revision of the registry copies flow."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final

from services.gateway.registry.registry import Registry
from shared.bus.messages import Message, ServeReply, ServeRequest, serve_topic
from shared.bus.zmq_sockets import Publisher, Requests
from shared.client import Source

ASK_AGAIN_SECONDS: Final = 1.0
QUIET_SECONDS: Final = 1.6
"""A service that has said nothing for so long is asked: one that sends copies tells their health each second."""
SILENT_SECONDS: Final = 2.5
"""One that has said nothing for so long, asked or not, may be stopped or stuck: nothing that it said counts."""
EXPIRE_LATE_SECONDS: Final = 0.002
"""Seconds after a deadline, so that it has passed for certain."""

CallLater = Callable[[float, Callable[[], None]], object]
"""The loop's function: seconds, and the function to call then."""


@dataclass(slots=True)
class _Question:
    """A `ServeRequest`, and the callbacks that wait for its answer."""

    finished: list[Callable[[], None]] = field(default_factory=list)
    id: int = 0
    revision: int = 0


class ServingQuery:
    """Asks the service that sends the copies of `source` which revision it serves, and notes it in the registry."""

    def __init__(
        self,
        source: Source,
        publisher: Publisher,
        requests: Requests,
        registry: Registry,
        serve_seconds: float,
        call_later: CallLater,
    ) -> None:
        self._topic = serve_topic(source)
        self._publisher = publisher
        self._requests = requests
        self._registry = registry
        self._serving = registry.serving[source]
        self._serve_seconds = serve_seconds
        self._call_later = call_later
        self._question: _Question | None = None
        self._was_possible = False
        self._asked_at = self._heard_at = self._checked_at = 0.0

    @property
    def possible(self) -> bool:
        """Return whether a service is there to be asked."""
        return self._publisher.wanted(self._topic)

    def ask(self, finished: Callable[[], None] = lambda: None) -> None:
        """Call `finished` once copies flow to every present collector, or when no answer came in time."""
        if not self.possible:
            self._serving.note_unanswered(self._registry.commit())
            finished()
            return
        if self._question is None:
            self._question = self._open()
        self._question.finished.append(finished)

    def note_heard(self) -> None:
        """Note that the service has said something just now."""
        self._heard_at = time.monotonic()

    def check(self) -> None:
        """Ask again, unless the last revision is known to be served; count on no service that is silent.

        Nobody waits for those who leave. But a change that the bus has lost is noticed by a question behind it.
        """
        now = time.monotonic()
        if now >= self._checked_at + ASK_AGAIN_SECONDS:
            self._heard_at = now  # it was this process that stood still, or nobody was there
        self._checked_at = now
        silent_seconds = now - self._heard_at
        if silent_seconds >= SILENT_SECONDS and self._serving.served >= 0:
            self._serving.forget()
        known = self._serving.served >= self._registry.commit()
        content = self._serving.newest < 0 or (known and silent_seconds < QUIET_SECONDS)
        if not content and now >= self._asked_at + ASK_AGAIN_SECONDS:
            self.ask()

    def note_subscriptions(self, fresh: Iterable[str]) -> bool:
        """Note the services that may be asked; return whether a question is due, to one that has just subscribed."""
        was_possible, self._was_possible = self._was_possible, self.possible
        subscribed = any(self._topic.startswith(prefix) for prefix in fresh)
        if was_possible and (subscribed or not self.possible):
            self._serving.forget()  # a service that was restarted may have gone and come back since the last call
        if subscribed:
            self.note_heard()
        if self._serving.newest < 0 or not subscribed:
            return False
        self.ask()
        return True

    def publish(self) -> None:
        """Publish the question behind the changes it asks about; it waits while the bus is full."""
        if self._question is not None:
            self._question.revision = self._registry.commit()
            body = ServeRequest(self._question.id, self._requests.topic, self._question.revision)
            if self._publisher.publish(self._topic, body):
                self._question = None

    def _open(self) -> _Question:
        """Return a question that goes out with the next `publish`."""
        question = _Question()
        question.id = self._requests.open(self._serve_seconds, lambda message: self._answered(question, message))
        self._asked_at = time.monotonic()
        self._call_later(self._serve_seconds + EXPIRE_LATE_SECONDS, self._requests.expire)
        return question

    def _answered(self, question: _Question, message: Message | None) -> None:
        if self._question is question:
            self._question = None  # the question never got on the bus
        if self.possible and message is not None and isinstance(message.body, ServeReply):
            self.note_heard()
            self._serving.note_served(min(question.revision, message.body.revision))
        else:
            self._serving.note_unanswered(question.revision or self._registry.commit())
        for finished in question.finished:
            finished()
