"""The streams that collectors want: subscribed to, followed by sequence, and known to flow."""

import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

from shared.bus.continuity import Continuity, Origin, Position
from shared.bus.kept_counts import KeptCounts, KeptFile
from shared.bus.living_workers import LivingWorkers
from shared.bus.messages import Envelope, Status, datagrams_topic, status_topic
from shared.bus.zmq_sockets import Subscriber
from shared.ledger.accounts import ENDED_NAME, Accounts, is_origin, parse_origin, unparse_origin
from shared.ledger.counters import (
    BASELINE,
    BUS_MISSED,
    MISSED,
    NO_SUBSCRIBER,
    PUBLISHED,
    REACHED,
    STARTED,
    TAKEN,
    UNSERVED,
)
from shared.log import WORKER_CAME, WORKER_GONE, get_logger

WORKERS: Final = ("ingest.", "uplink.")
"""Beginnings of the names of those that publish datagrams: uplink, what other sites have sent."""
STREAM: Final = "stream/"
WORKER_SECONDS: Final = 3.0
"""A worker that has not reported for this long has ended, or hangs."""

log = get_logger()


UNWANTED: Final = "unwanted"
"""In what is kept of an origin: one more than it has dropped for lack of subscribers; 0: that is not known."""
ORIGIN_COUNTERS: Final = (REACHED, BASELINE, MISSED, UNSERVED, UNWANTED)
SETTLED: Final = "settled/"
"""The table of what is kept of each stream: the datagrams published on it less what its origins have reached."""


@dataclass(slots=True)
class _Worker:
    """A worker's last report: its time, the streams in it, whether those are all, and whether it was the last one."""

    started_ns: int
    heard_at: float = 0.0
    streams: set[str] = field(default_factory=set)
    whole: bool = False
    ended: bool = False


class Unserved(NamedTuple):
    """Datagrams that a worker had and that never came, since this service or the bus was away.

    With `before` this process had not begun: they are owed only to collectors that the last one served. Those that were
    not `published`, for lack of subscribers, no journal has.
    """

    stream: str
    datagrams: int
    before: bool
    published: bool = True


class FollowedStreams:
    """Subscribes to wanted streams, and counts what came and what should have come, also while this service was away.

    A worker publishes while anybody subscribes, as `reached` tells, and drops and counts it otherwise.
    """

    def __init__(
        self, subscriber: Subscriber, directory: Path, kept: KeptFile, kinds: tuple[str, ...] = WORKERS
    ) -> None:
        self._missed = 0
        self.published: Counter[str] = Counter()
        """By stream: datagrams that workers had while it was subscribed to, whether they came or not."""
        self._since = kept.new_counts()
        """By stream: the time, in ns since 1970, since which it is wanted, by this process or by those before it."""
        self._kept = kept
        self._began_ns = time.time_ns()
        self._subscriber = subscriber
        self._workers_here = LivingWorkers(directory)
        self._living: dict[str, float] = {}
        """By worker that lives: the time of its last report, or at which it was seen first."""
        self._hanging: set[str] = set()
        self._topics: dict[str, str] = {}
        self._continuity = Continuity()
        self._counts: dict[Origin, KeptCounts] = {}
        self._left: dict[Origin, Position] = {}
        """Positions that the last process had reached, until the first message of their origin."""
        self._unwanted: dict[Origin, int] = {}
        """Datagrams that a worker dropped for lack of subscribers, as it told last."""
        self._workers: dict[tuple[str, int], _Worker] = {}
        self.came_and_gone: list[tuple[str, str]] = []
        """Events not logged yet, each with a worker's name."""
        self._heard: set[Origin] = set()
        """Origins whose worker has told of these to this process."""
        self._unserved: list[Unserved] = []
        self._kinds = kinds
        self._status = tuple(status_topic(each)[:-1] for each in kinds)
        for prefix in self._status:
            subscriber.subscribe(prefix)

    def restore(self, tables: Mapping[str, Mapping[str, int]]) -> None:
        """Go on from what the last process has left, before anything is subscribed to."""
        self.published.update(tables.get(SETTLED, {}))
        self._since.update(tables.get("since/", {}))
        for name, counts in tables.items():
            if is_origin(name):
                worker, boot, stream = parse_origin(name)
                baseline, missed, unserved, reached = (
                    counts.get(each, 0) for each in (BASELINE, MISSED, UNSERVED, REACHED)
                )
                taken = reached - baseline - missed - unserved
                origin = worker, boot, datagrams_topic(stream)
                self._left[origin] = Position(0, baseline, reached, taken, missed, unserved)
                self._counts[origin] = self._kept.new_counts(counts)
                self.published[stream] += reached
                if unwanted := counts.get(UNWANTED, 0):
                    self._unwanted[origin] = unwanted - 1

    def tables(self) -> dict[str, KeptCounts]:
        """Return what is to be kept for the next process.

        A batch is noted by one counter, what its origin has reached; how much was published follows from that.
        """
        known = self._continuity.positions.keys() | self._left.keys()
        self._counts = {origin: counts for origin, counts in self._counts.items() if origin in known}
        self._unwanted = {origin: count for origin, count in self._unwanted.items() if origin in known}
        self._heard &= known
        settled, origins = Counter(self.published), {}
        for (sender, boot, topic), counts in self._counts.items():
            stream = topic.split("/")[1]
            origins[unparse_origin(sender, boot, stream)] = counts
            settled[stream] -= counts[REACHED]
        return {SETTLED: self._kept.new_counts(settled), "since/": self._since, **origins}

    def subscribe_to(self, streams: Iterable[str]) -> None:
        """Subscribe to these streams and no others."""
        topics = {datagrams_topic(stream): stream for stream in streams}
        for stream in [stream for stream, since in self._since.items() if since]:
            if datagrams_topic(stream) not in topics:
                self._since[stream] = 0
        for topic in topics.keys() - self._topics.keys():
            self._since[topics[topic]] = self._since[topics[topic]] or time.time_ns()
            self._subscriber.subscribe(topic)
        if (
            topics.keys() - self._topics.keys()
        ):  # each worker then reports at once: it tells how much nobody wanted so far
            for prefix in self._status:
                self._subscriber.unsubscribe(prefix)
                self._subscriber.subscribe(prefix)
        for topic in self._topics.keys() - topics.keys():
            self._subscriber.unsubscribe(topic)
            self._continuity.forget(topic)
        self._left = {origin: position for origin, position in self._left.items() if origin[2] in topics}
        self._unwanted = {origin: count for origin, count in self._unwanted.items() if origin[2] in topics}
        self._heard = {origin for origin in self._heard if origin[2] in topics}
        self._topics = topics

    def positions(self, stream: str) -> dict[tuple[str, int], Position]:
        """Return the positions in a stream that this process, or the last one, has reached, by worker and boot id."""
        topic = datagrams_topic(stream)
        known = self._left | self._continuity.positions
        return {origin[:2]: position for origin, position in known.items() if origin[2] == topic}

    def wanted_since(self, stream: str) -> int:
        """Return the time, in ns since 1970, since which a stream is wanted; 0: it is not."""
        return self._since.get(stream, 0)

    @property
    def workers_left(self) -> set[tuple[str, int]]:
        """Names and boot ids of the workers that the last process followed, and that have sent nothing since."""
        return {origin[:2] for origin in self._left}

    @property
    def workers(self) -> dict[tuple[str, int], int]:
        """Names and boot ids of the workers that have reported lately, with the time of their start, by their clock."""
        after = time.monotonic() - WORKER_SECONDS
        return {origin: worker.started_ns for origin, worker in self._workers.items() if worker.heard_at > after}

    @property
    def publishing(self) -> set[tuple[str, int]]:
        """Names and boot ids of those of them that have not ended in order."""
        return {origin for origin in self.workers if not self._workers[origin].ended}

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
    def counters(self) -> dict[str, int]:
        """Messages that came twice and were dropped, and datagrams that never came, since this process was started."""
        return {"bus_repeated": self._continuity.repeated, BUS_MISSED: self._missed}

    def follows(self, topic: str, envelope: Envelope) -> bool:
        """Return whether a batch is the next one of its origin, as far as that is known."""
        position = self._continuity.positions.get((envelope.sender, envelope.boot, topic))
        return position is None or position.reached == envelope.total

    def note_batch(self, topic: str, envelope: Envelope, count: int) -> int | None:
        """Note a batch; return datagrams missed before it, None when it is a repeat or no longer wanted."""
        if topic not in self._topics or not envelope.sender.startswith(self._kinds):
            return None
        origin, stream = (envelope.sender, envelope.boot, topic), self._topics[topic]
        left = self._left.pop(origin, None)
        if left:
            self._continuity.positions[origin] = left
        missed = self._continuity.observe(topic, envelope, count)
        if missed is None:
            return None
        position = self._continuity.positions[origin]
        if left and missed:
            self._count_unserved(stream, missed, before=True)
            position.unserved, position.missed, missed = position.unserved + missed, position.missed - missed, 0
        self._missed += missed
        self.published[stream] += missed + count
        self._keep(origin, position)
        return missed

    def _keep(self, origin: Origin, position: Position) -> None:
        counts = self._counts.get(origin)
        if counts is None:
            counts = self._counts[origin] = self._kept.new_counts()
            self._kept.suspend()
        elif counts[BASELINE] != position.baseline or counts[UNSERVED] != position.unserved:
            self._kept.suspend()
        counts[REACHED] = position.reached  # what is not known to be missed, from here on, was in our hands
        if counts[MISSED] != position.missed:
            counts[MISSED] = position.missed
        if self._kept.suspended:
            counts[BASELINE], counts[UNSERVED] = position.baseline, position.unserved

    def _count_unserved(self, stream: str, count: int, *, before: bool, published: bool = True) -> None:
        self.published[stream] += count
        self._unserved.append(Unserved(stream, count, before, published))

    @property
    def unserved(self) -> bool:
        """Return whether `pop_unserved` has anything to return."""
        return bool(self._unserved)

    def pop_unserved(self) -> list[Unserved]:
        """Return what was found to be unserved since the last call."""
        found, self._unserved = self._unserved, []
        return found

    def reconcile(self, envelope: Envelope, status: Status) -> Counter[str]:
        """Compare a worker's own count with what came from it; return datagrams missed at the end, by stream."""
        key = envelope.sender, envelope.boot
        worker = self._workers.get(key)
        if worker is None:
            worker = self._workers[key] = _Worker(status.started_ns)
            self.came_and_gone.append((WORKER_CAME, envelope.sender))
        worker.streams.update(name.removeprefix(STREAM) for name in status.accounts if name.startswith(STREAM))
        worker.heard_at, worker.ended = time.monotonic(), status.ended
        self._hanging.discard(envelope.sender)
        missed = self._note_ends(envelope.sender, status)
        if not worker.whole and status.piece + 1 == status.pieces:
            worker.whole = True
            self._left = {each: left for each, left in self._left.items() if each[0] != key[0] or each[1] == key[1]}
        for topic, stream in self._topics.items():
            origin = (*key, topic)
            account, position = status.accounts.get(f"stream/{stream}"), self._continuity.positions.get(origin)
            if account is None or position is None:
                continue
            lost = self._continuity.reconcile(origin, account.get(PUBLISHED, 0))
            if lost:
                missed[stream] += lost
                self.published[stream] += lost
            unwanted = account.get(NO_SUBSCRIBER, 0)
            if self._note_unwanted(origin, position, unwanted, self._started(origin, worker)) or lost:
                self._keep(origin, position)
        self._missed += missed.total()
        return missed

    def _started(self, origin: Origin, worker: _Worker) -> int:
        """Return the time of a worker's start, in ns since 1970, as far as it matters here.

        It is later than our wish for the stream if we have followed a predecessor, even where the clock was set back.
        """
        if origin in self._unwanted or worker.started_ns > self._since[self._topics[origin[2]]]:
            return worker.started_ns
        followed = any((name, topic) == (origin[0], origin[2]) for name, _, topic in self._unwanted)
        return self._since[self._topics[origin[2]]] + 1 if followed else worker.started_ns

    def _note_ends(self, sender: str, status: Status) -> Counter[str]:
        """Note the last counts of earlier starts of a worker; return the datagrams missed, by stream.

        A killed worker may have published datagrams that have not come here. Its successor alone tells how many.
        """
        missed: Counter[str] = Counter()
        for name, account in status.accounts.items():
            found = ENDED_NAME.fullmatch(name)
            if found is None or (topic := datagrams_topic(found[2])) not in self._topics:
                continue
            stream, origin, started_ns = found[2], (sender, int(found[1], 16), topic), account.get(STARTED, 0)
            followed = self._continuity.positions.get(origin)
            position = followed or self._left.pop(origin, None)
            if position is None and not 0 < self._since[stream] < started_ns:
                continue  # it was there before anybody wanted the stream
            position = self._continuity.positions[origin] = position or Position(0, 0, 0)
            if lost := self._continuity.reconcile(origin, account.get(PUBLISHED, 0)):
                if followed:
                    missed[stream] += lost
                    self.published[stream] += lost
                else:
                    position.missed, position.unserved = position.missed - lost, position.unserved + lost
                    self._count_unserved(stream, lost, before=started_ns < self._began_ns)
            if lost or not followed:
                self._keep(origin, position)
            if self._note_unwanted(origin, position, account.get(NO_SUBSCRIBER, 0), started_ns):
                self._keep(origin, position)
        return missed

    def _note_unwanted(self, origin: Origin, position: Position, unwanted: int, started_ns: int) -> bool:
        """Note the datagrams that a worker has dropped for lack of subscribers; return whether that is news."""
        stream, before = self._topics[origin[2]], started_ns < self._began_ns
        known, first = self._unwanted.get(origin), origin not in self._heard
        self._heard.add(origin)
        if known == unwanted:
            return False
        if known is None and started_ns > self._since[stream] > 0:
            # All that it had was wanted. What it has published, to others, before it heard of us, is not taken.
            known = 0
            if position.baseline:
                self._count_unserved(stream, position.baseline, before=before)
                position.unserved, position.baseline = position.unserved + position.baseline, 0
        if known is not None and unwanted > known:
            self._count_unserved(stream, unwanted - known, before=before and first, published=False)
        self._unwanted[origin] = unwanted
        self._kept.suspend()
        self._counts[origin][UNWANTED] = unwanted + 1
        return True

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
        # A worker that is heard does not hang, whether it lives or has just ended.
        living = list(heard) if self._workers_here.all_in(heard) else self._workers_here.among(heard)
        self._living = {name: heard.get(name, self._living.get(name, now)) for name in living}
        hanging = {name for name, at in self._living.items() if at <= after}
        for name in sorted(hanging - self._hanging):
            log.warning("an ingest worker that runs is not heard of: it or the broker hangs", worker=name)
        self._hanging = hanging
        self.came_and_gone += [(WORKER_GONE, name) for name, _ in silent if name not in hanging]

    def tell_of_workers(self, *, silently: bool) -> None:
        """Log which workers have come and gone since the last call, unless another service does."""
        for event, worker in () if silently else self.came_and_gone:
            (log.info if event == WORKER_CAME else log.warning)(event, of=worker)
        self.came_and_gone.clear()

    def close(self) -> None:
        """Look after workers no more."""
        self._workers_here.close()

    def accounts(self) -> Accounts:
        """Return one account an origin: the count at the start, what came, what never came, the count now."""
        return {
            unparse_origin(sender, boot, self._topics[topic]): {
                BASELINE: position.baseline,
                TAKEN: position.taken,
                MISSED: position.missed,
                REACHED: position.reached,
                **({UNSERVED: position.unserved} if position.unserved else {}),
            }
            for (sender, boot, topic), position in self._continuity.positions.items()
        }
