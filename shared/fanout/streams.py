"""The streams that collectors want: subscribed to, followed by sequence, and known to flow."""

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from shared.bus.continuity import Continuity
from shared.bus.living_workers import LivingWorkers
from shared.bus.messages import Envelope, Status, datagrams_topic, status_topic
from shared.bus.zmq_sockets import Subscriber
from shared.ledger import BASELINE, MISSED, PUBLISHED, REACHED, TAKEN, Accounts, unparse_origin
from shared.log import WORKER_CAME, WORKER_GONE, get_logger

WORKERS: Final = "ingest."
INGEST_STATUS: Final = status_topic(WORKERS)[:-1]
STREAM: Final = "stream/"
WORKER_SECONDS: Final = 3.0
"""A worker that has not reported for this long has ended, or hangs."""

log = get_logger()


@dataclass(slots=True)
class _Worker:
    """A worker's last report: its time, the streams in it, and whether those are all."""

    heard_at: float = 0.0
    streams: set[str] = field(default_factory=set)
    whole: bool = False


class FollowedStreams:
    """Subscribes to wanted streams, and counts what came and what should have come."""

    def __init__(self, subscriber: Subscriber, directory: Path) -> None:
        self.published: Counter[str] = Counter()
        """By stream: datagrams that workers published while it was subscribed to, whether they came or not."""
        self._subscriber = subscriber
        self._workers_here = LivingWorkers(directory)
        self._living: dict[str, float] = {}
        """By worker that lives: the time of its last report, or at which it was seen first."""
        self._hanging: set[str] = set()
        self._topics: dict[str, str] = {}
        self._continuity = Continuity()
        self._workers: dict[tuple[str, int], _Worker] = {}
        self.came_and_gone: list[tuple[str, str]] = []
        """Events not logged yet, each with a worker's name."""
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
        """Return whether there are workers, none hangs, and each is known to have seen every subscription.

        Its mark tells that. It tells of streams that the worker has: it may not have read of a new one yet.
        """
        after = time.monotonic() - WORKER_SECONDS
        heard = [(origin, worker) for origin, worker in self._workers.items() if worker.heard_at > after]
        return (
            bool(heard)
            and not self._hanging
            and all(
                worker.whole and (*origin, topic) in self._continuity.positions
                for origin, worker in heard
                for topic, stream in self._topics.items()
                if stream in worker.streams or not worker.whole
            )
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
        worker = self._workers.get((envelope.sender, envelope.boot))
        if worker is None:
            worker = self._workers[envelope.sender, envelope.boot] = _Worker()
            self.came_and_gone.append((WORKER_CAME, envelope.sender))
        worker.streams.update(name.removeprefix(STREAM) for name in status.accounts if name.startswith(STREAM))
        worker.heard_at = time.monotonic()
        self._hanging.discard(envelope.sender)
        worker.whole |= status.piece + 1 == status.pieces
        missed = {}
        for topic, stream in self._topics.items():
            account = status.accounts.get(f"stream/{stream}", {})
            lost = self._continuity.reconcile((envelope.sender, envelope.boot, topic), account.get(PUBLISHED, 0))
            if lost:
                missed[stream] = lost
                self.published[stream] += lost
        return missed

    def sort_out_silent_workers(self) -> None:
        """Forget workers that have ended, and find those that hang: datagrams wait with them. Due each second.

        On a bus without a directory here, a worker that hangs can't be told from one that has ended.
        """
        now = time.monotonic()
        after = now - WORKER_SECONDS
        silent = [origin for origin, worker in self._workers.items() if worker.heard_at <= after]
        for origin in silent:
            del self._workers[origin]
        heard = {name: self._workers[name, boot].heard_at for name, boot in self._workers}
        living = self._workers_here.among(heard)
        self._living = {name: heard.get(name, self._living.get(name, now)) for name in living}
        hanging = {name for name, at in self._living.items() if at <= after}
        for name in sorted(hanging - self._hanging):
            log.warning("an ingest worker that runs is not heard of: it or the broker hangs", worker=name)
        self._hanging = hanging
        self.came_and_gone += [(WORKER_GONE, name) for name, _ in silent if name not in hanging]

    def close(self) -> None:
        """Look after workers no more."""
        self._workers_here.close()

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
