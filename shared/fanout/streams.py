"""The streams that collectors want: subscribed to, followed by sequence, and known to flow."""

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from shared.bus.continuity import Continuity
from shared.bus.messages import Envelope, Status, datagrams_topic, status_topic
from shared.bus.zmq_sockets import Subscriber
from shared.ledger import BASELINE, MISSED, PUBLISHED, REACHED, TAKEN, Accounts, unparse_origin

WORKERS: Final = "ingest."
INGEST_STATUS: Final = status_topic(WORKERS)[:-1]
STREAM: Final = "stream/"
WORKER_SECONDS: Final = 3.0
"""A worker that has not reported for this long is not waited for."""


@dataclass(slots=True)
class _Worker:
    """A worker's last report: its time, the streams in it, and whether those are all."""

    heard_at: float = 0.0
    streams: set[str] = field(default_factory=set)
    whole: bool = False


class FollowedStreams:
    """Subscribes to wanted streams, and counts what came and what should have come."""

    def __init__(self, subscriber: Subscriber) -> None:
        self.published: Counter[str] = Counter()
        """By stream: datagrams that workers published while it was subscribed to, whether they came or not."""
        self._subscriber = subscriber
        self._topics: dict[str, str] = {}
        self._continuity = Continuity()
        self._workers: dict[tuple[str, int], _Worker] = {}
        subscriber.subscribe(INGEST_STATUS)

    def subscribe_to(self, streams: Iterable[str]) -> None:
        """Subscribe to these streams and no others."""
        topics = {datagrams_topic(stream): stream for stream in streams}
        for topic in topics.keys() - self._topics.keys():
            self._subscriber.subscribe(topic)
        for topic in self._topics.keys() - topics.keys():
            self._subscriber.unsubscribe(topic)
            self._continuity.forget(topic)
        self._topics = topics

    @property
    def flowing(self) -> bool:
        """Return whether there are workers, and each is known, by its mark, to have seen every subscription.

        This holds for streams that the worker has: it may not have read of a new one yet.
        """
        after = time.monotonic() - WORKER_SECONDS
        heard = [(origin, worker) for origin, worker in self._workers.items() if worker.heard_at > after]
        return bool(heard) and all(
            worker.whole and (*origin, topic) in self._continuity.positions
            for origin, worker in heard
            for topic, stream in self._topics.items()
            if stream in worker.streams or not worker.whole
        )

    @property
    def repeated(self) -> int:
        """Bus messages that came twice and were dropped."""
        return self._continuity.repeated

    def note_batch(self, topic: str, envelope: Envelope, count: int) -> int | None:
        """Note a batch; return datagrams missed before it, None when it is a repeat or no longer wanted."""
        if topic not in self._topics or not envelope.sender.startswith(WORKERS):
            return None
        missed = self._continuity.observe(topic, envelope, count)
        if missed is not None:
            self.published[self._topics[topic]] += missed + count
        return missed

    def reconcile(self, envelope: Envelope, status: Status) -> dict[str, int]:
        """Compare a worker's own count with what came from it; return datagrams missed at the end, by stream."""
        worker = self._workers.setdefault((envelope.sender, envelope.boot), _Worker())
        worker.streams.update(name.removeprefix(STREAM) for name in status.accounts if name.startswith(STREAM))
        worker.heard_at = time.monotonic()
        worker.whole |= status.piece + 1 == status.pieces
        missed = {}
        for topic, stream in self._topics.items():
            account = status.accounts.get(f"stream/{stream}", {})
            lost = self._continuity.reconcile((envelope.sender, envelope.boot, topic), account.get(PUBLISHED, 0))
            if lost:
                missed[stream] = lost
                self.published[stream] += lost
        return missed

    def forget_silent_workers(self) -> None:
        """Drop workers that have not reported for long, so that the table stays small."""
        after = time.monotonic() - WORKER_SECONDS
        self._workers = {origin: worker for origin, worker in self._workers.items() if worker.heard_at > after}

    def accounts(self) -> Accounts:
        """Return one account an origin: the count at the start, what came, what was missed, the count now."""
        return {
            unparse_origin(sender, boot, self._topics[topic]): {
                BASELINE: position.baseline,
                TAKEN: position.taken,
                MISSED: position.missed,
                REACHED: position.reached,
            }
            for (sender, boot, topic), position in self._continuity.positions.items()
        }
