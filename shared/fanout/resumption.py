"""Going on where the last process of this name has stopped: what came meanwhile goes before what comes now.

A sender that ends asks the workers to hold their batches (`hold_topic`), and its successor asks for them
(`again_topic`), by a name that no other reader of the bus knows. For a journal, whose name is no secret, workers hold
the latest batches at any time, and keep them when they were handed on. Until a worker has handed on all of them, its
other messages wait. So nothing is lost, and copies are in order. What comes both ways is a repeat, by its position.

Once a worker holds, all that it has published before has come too: the sender takes batches until each one tells so.
"""

import secrets
import time
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Final

from shared.bus.continuity import Worker
from shared.bus.kept_counts import KeptCounts
from shared.bus.messages import Again, Message, again_topic, datagrams_topic, hold_topic
from shared.bus.zmq_sockets import Subscriber
from shared.log import get_logger

HEEDED: Final = ".heeded"
"""Ends a name for which nothing is held. A worker answers that when it has heeded what was asked for before."""
TABLE: Final = "resumption/"
KEY: Final = "key"
"""Table and counter by which a process leaves a secret to its successor."""
PATIENCE_SECONDS: Final = 5.0
"""Time for the next message of what was held. A worker that has ended, or is of an earlier release, sends none."""
MAX_WAITING: Final = 2048
MAX_WAITING_BYTES: Final = 64 << 20
"""Messages that wait, and their payload: beyond that nothing is waited for any more."""

log = get_logger()


class WaitingMessages:
    """Messages that wait, by worker, each one's in order; `full` once there are too many."""

    def __init__(self) -> None:
        self._waiting: dict[Worker, list[Message]] = {}
        self._count = self._bytes = 0

    def __contains__(self, worker: Worker) -> bool:
        return worker in self._waiting

    def __bool__(self) -> bool:
        return bool(self._waiting)

    @property
    def full(self) -> bool:
        """Return whether no more may wait."""
        return self._count > MAX_WAITING or self._bytes > MAX_WAITING_BYTES

    def add(self, worker: Worker, message: Message) -> None:
        """Let a message of a worker wait."""
        self._waiting.setdefault(worker, []).append(message)
        self._note([message], 1)

    def pop(self, worker: Worker, until: Callable[[Message], bool] = lambda _: False) -> list[Message]:
        """Return the messages of a worker that need not wait any more: those before the first one of a kind, or all."""
        messages = self._waiting.pop(worker, [])
        stop = next((at for at, each in enumerate(messages) if until(each)), len(messages))
        if rest := messages[stop:]:
            self._waiting[worker] = rest
        self._note(messages[:stop], -1)
        return messages[:stop]

    def pop_all(self, until: Callable[[Message], bool] = lambda _: False) -> list[Message]:
        """Return likewise those of all workers."""
        return [message for worker in list(self._waiting) for message in self.pop(worker, until)]

    def _note(self, some: Sequence[Message], sign: int) -> None:
        self._count += sign * len(some)
        self._bytes += sign * sum(len(each.batch.payload) for each in some if each.batch is not None)


class Resumption:
    """Asks for what was held, and puts the messages of each worker in order."""

    def __init__(
        self,
        name: str,
        subscriber: Subscriber,
        new_counts: Callable[[Mapping[str, int]], KeptCounts] | None = None,
        clock: Callable[[], float] = time.monotonic,
        patience: float = PATIENCE_SECONDS,
    ) -> None:
        self._name = name
        self._patience = patience
        self._subscriber = subscriber
        self._own = new_counts({KEY: secrets.randbits(62)}) if new_counts else None
        self._held_for = ""
        """The name for which the last process has asked to hold batches."""
        self._clock = clock
        self._awaited: set[Worker] = set()
        """Workers that still have to hand on what they have held."""
        self._waiting = WaitingMessages()
        self._asked: set[Worker] = set()
        """Workers that have not told yet that they hold for the next process."""
        self._resumed = 0
        self._deadline = 0.0

    def hand_over(self, workers: Iterable[Worker] = ()) -> None:
        """Ask workers to hold what they publish from now on: this process ends. These are to tell that they do."""
        own = f"{self._name}.{self._own[KEY]:x}" if self._own else self._name
        self._subscriber.subscribe(hold_topic(own))
        self._asked = set(workers)
        for worker, _ in self._asked:
            self._subscriber.subscribe(again_topic(worker, own + HEEDED))

    def handed_over(self, living: Container[Worker]) -> bool:
        """Return whether all workers hold that were asked to, and that live."""
        return not any(worker in living for worker in self._asked)

    def tables(self) -> dict[str, KeptCounts]:
        """Return what is to be kept for the next process."""
        return {TABLE: self._own} if self._own else {}

    def begin(self, workers: Iterable[Worker], tables: Mapping[str, Mapping[str, int]]) -> None:
        """Ask for what these workers, which the last process followed, have held; after the streams are subscribed.

        `tables` are those that it has kept.
        """
        self._held_for = f"{self._name}.{tables.get(TABLE, {}).get(KEY, 0):x}" if self._own else self._name
        self._awaited = set(workers)
        self._deadline = self._clock() + self._patience
        for worker, _ in self._awaited:
            self._subscriber.subscribe(again_topic(worker, self._held_for))

    def order(self, message: Message) -> Sequence[Message]:
        """Return the messages that are to be handled now that this one has come."""
        body, worker = message.body, (message.envelope.sender, message.envelope.boot)
        if isinstance(body, Again) and message.topic.endswith(HEEDED + "/"):
            self._asked.discard(worker)
            return ()
        if not self._awaited:
            return () if isinstance(body, Again) else (message,)
        if not isinstance(body, Again):
            return self._defer(worker, message) if worker in self._awaited else (message,)
        self._deadline = self._clock() + self._patience
        if message.batch:
            self._resumed += len(message.batch)
            return (replace(message, topic=datagrams_topic(body.stream)),)
        if not body.left:
            return self._release([worker])
        self._subscriber.unsubscribe(topic := again_topic(worker[0], self._held_for))
        self._subscriber.subscribe(topic)
        return ()

    def overdue(self) -> Sequence[Message]:
        """Return the messages that need not wait any more, as nothing was handed on for a while."""
        return self._release(list(self._awaited)) if self._awaited and self._clock() >= self._deadline else ()

    def _defer(self, worker: Worker, message: Message) -> Sequence[Message]:
        self._waiting.add(worker, message)
        return self._release(list(self._awaited)) if self._waiting.full else ()

    def _release(self, workers: Sequence[Worker]) -> Sequence[Message]:
        """Wait for these workers no more; return their messages that waited."""
        for worker in workers:
            self._awaited.discard(worker)
            self._subscriber.unsubscribe(again_topic(worker[0], self._held_for))
        if not self._awaited and self._resumed:
            log.info("copies go on where the last process has stopped", service=self._name, datagrams=self._resumed)
        return [message for worker in workers for message in self._waiting.pop(worker)]
