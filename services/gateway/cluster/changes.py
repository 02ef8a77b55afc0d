"""Changes of a registry that several nodes share: decided by what this node has, written, and made as they come back.

Changes that wait together and have nothing in common are written together, all or none. Where another node was first,
they are decided anew.
"""

import asyncio
import errno
import math
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeVar

from services.gateway.admission.peer import Peer
from services.gateway.cluster.bucket_log import LARGEST_BATCH, BucketLog, LogError, OvertakenError, Write
from services.gateway.cluster.records import Record, encode, key_of, seconds_of
from services.gateway.cluster.replica import Replica
from services.gateway.fault_guard import surviving
from services.gateway.protocol.requests import ErrorWord, RequestError
from services.gateway.registry.changes import FAULT, Change, ignore
from services.gateway.registry.entry import Entry
from shared.log import get_logger

PATIENCE_SECONDS: Final = 6.0
"""Time for a request: as long as JetStream mostly needs to choose a new leader."""
AGAIN_SECONDS: Final = 1.0
"""Time after which a change of ours is tried again that was not made; twice as long after each failure to write it."""
MOST_FAILURES: Final = 5
TOGETHER: Final = 64
"""Changes that are written together."""
DOUBTED: Final[frozenset[ErrorWord]] = frozenset({
    "name_taken", "stale_generation", "address_taken", "registry_full", "bad_name", "not_permitted",
})  # fmt: skip
"""Refusals for a reason that may have gone: they are given once all that others have changed before is known."""
AWAY: Final = "the cluster has no quorum, or can't be reached from this node"
LATE: Final = "the cluster did not answer in time: the request may have been granted, or may be granted yet"
T = TypeVar("T")

log = get_logger()


@dataclass(slots=True, eq=False)
class _Asked:
    """A change that somebody waits for; without `failed`, it is tried until it succeeds."""

    act: Callable[[], Any]
    done: Callable[[Any], None]
    failed: Callable[[Exception], None] | None
    deadline: float
    sure: bool = False
    """All that others have changed before it was asked for is known."""
    written: bool = False
    landed: bool = False
    """All that was written last has come back."""
    finished: bool = False
    failures: int = 0
    """Failures to write it: since then it is written alone, as the others may have been the cause, or it theirs."""


@dataclass(slots=True, eq=False)
class _Waiting:
    """A call that waits until all is known that other nodes had changed; without `failed`, for as long as it takes."""

    act: Callable[[], None]
    failed: Callable[[Exception], None] | None
    deadline: float


class ClusterChanges:
    """Makes changes, one batch after the other. `available` is set while records can be written."""

    def __init__(self, replica: Replica, max_clients: int, max_of_holder: int) -> None:
        self._replica = replica
        self._registry = replica.registry
        self._limits = max_clients, max_of_holder
        self.log: BucketLog | None = None
        self.available = asyncio.Event()
        self.unavailable_since = -math.inf
        self.connected: Callable[[Peer], bool] = lambda _peer: True
        """Says whether a peer's connection is still open."""
        self.refused = 0
        """Requests that found no quorum, or no answer in time."""
        self.shrunk = False
        """True if the server has dropped records of the list before their time."""
        self.overtaken = 0
        """Batches decided anew, because another node was first."""
        self._queue: deque[_Asked] = deque()
        self._written: list[_Asked] = []
        self._waiting: list[_Waiting] = []
        self._moved = asyncio.Event()
        self.wake = asyncio.Event()
        self.wanted = asyncio.Event()
        """Somebody waits for a record behind what others have written."""

    def make(
        self, act: Callable[[], T], done: Callable[[T], None], failed: Callable[[Exception], None] | None = None
    ) -> None:
        """Decide and change by `act`, as `services.gateway.registry.changes.Changes` says."""
        if failed is not None and self._hopeless():
            self._refuse(failed, AWAY)
            return
        deadline = math.inf if failed is None else self._now() + PATIENCE_SECONDS
        self._append(_Asked(act, done, failed, deadline))

    def renew(
        self, find: Callable[[], Entry], done: Callable[[Entry], None], failed: Callable[[Exception], None]
    ) -> None:
        """Give an entry its whole lease, once it is known that no other node has changed it before."""
        self.when_sure(partial(self._renew, find, done, failed), failed)

    def when_sure(self, act: Callable[[], None], failed: Callable[[Exception], None] | None) -> None:
        """Call `act` once all is known that other nodes had changed when this was called."""
        if failed is not None and self._hopeless():
            self._refuse(failed, AWAY)
            return
        self._waiting.append(_Waiting(act, failed, self._now() + PATIENCE_SECONDS))
        self.wanted.set()
        self.wake.set()

    def _renew(
        self, find: Callable[[], Entry], done: Callable[[Entry], None], failed: Callable[[Exception], None]
    ) -> None:
        try:
            entry = find()
        except (RequestError, OSError) as refused:
            failed(refused)
            return
        # A renewal anywhere else moves the entry: a home that wakes after its end can't expire what was renewed since.
        if not entry.ttl or (entry.home == self._registry.node and self._registry.leases.measures(entry)):
            self._registry.renew(entry)
            done(entry)
            return
        self.make(lambda: self._registry.move(find()), lambda _: done(find()), failed)

    def waiting(self) -> set[_Waiting]:
        """Return what is to be called once the next record of this node's session has come back."""
        self.wanted.clear()
        return {*self._waiting}

    def call(self, sure: set[_Waiting]) -> None:
        """Call these, as far as they still wait."""
        called = [each for each in self._waiting if each in sure]
        self._waiting = [each for each in self._waiting if each not in sure]
        for each in called:
            try:
                each.act()
            except Exception as error:
                _call(each.failed or ignore, _as_told(error))

    def lose(self) -> None:
        """Note that records can't be written now."""
        if self.available.is_set():
            self.unavailable_since = self._now()
        self.available.clear()

    def note_position(self) -> None:
        """Note that the replica has moved on."""
        self._moved.set()

    async def reach(self, position: int, seconds: float) -> bool:
        """Wait until the replica is at a position; return whether it is."""
        end = self._now() + seconds
        while self._replica.position < position:
            self._moved.clear()
            try:
                async with asyncio.timeout_at(end):
                    await self._moved.wait()
            except TimeoutError:
                return False
        return True

    async def run(self) -> None:
        """Make the changes that are asked for, for ever."""
        self.unavailable_since = self._now()
        while True:
            self._expire()
            if not self._queue or not self.available.is_set() or self.log is None:
                self.wake.clear()
                try:
                    async with asyncio.timeout(0.25 if self._queue or self._waiting or self._written else None):
                        await (self.available if self._queue else self.wake).wait()
                except TimeoutError:
                    pass
                continue
            await self._write_some(self.log)

    def _expire(self) -> None:
        """Refuse what has waited for too long."""
        now = self._now()
        for asked in [*self._queue, *self._written]:
            if asked.deadline <= now and not asked.finished and asked.failed is not None:
                asked.finished = True
                self._refuse(asked.failed, LATE if asked.written else AWAY)
        self._queue = deque(asked for asked in self._queue if not asked.finished)
        self._written = [asked for asked in self._written if not asked.finished]
        for each in self._waiting:
            if each.deadline <= now and each.failed is not None:
                self._refuse(each.failed, AWAY)
        self._waiting = [each for each in self._waiting if each.deadline > now or each.failed is None]

    async def _write_some(self, bucket: BucketLog) -> None:
        """Write a batch of what waits, and wait until it has come back."""
        batch = list(self._plan_batch())
        if not batch:
            return
        whole, writes = [asked for asked, _ in batch], [write for _, some in batch for write in some]
        for asked in whole:
            asked.written, asked.landed = True, False
        writes.sort(key=lambda write: not write.key.startswith("list."))  # the condition stands on the first one
        expected = self._replica.list_position
        try:
            position = await bucket.write(writes, expected)
        except OvertakenError as error:
            self.overtaken += 1
            self._queue.extendleft(asked for asked in reversed(whole) if not asked.finished)
            if 0 <= error.position < expected and self._replica.list_position == expected:
                self._replica.list_position = error.position  # the server has dropped what was the last one
                self.shrunk |= time.time() < self._replica.list_ends_at
            else:
                await self.reach(error.position, 1.0)
            await asyncio.sleep(random.uniform(0, 0.005))
            return
        except Exception as error:
            if not isinstance(error, LogError):
                log.error("a fault has kept changes from being written", reason=repr(error), exc_info=error)
            self.lose()
            self._put_back(whole)
            return
        self._written += whole
        if not await self.reach(position, 2.0):
            self.lose()
        # A change that is tried until it succeeds may be larger than one batch; or no node has accepted its records.
        for asked in [asked for asked in self._written if asked.failed is None]:
            self._written.remove(asked)
            asked.failures = 0
            self._append_in(0.0 if asked.landed else AGAIN_SECONDS, asked)

    def _put_back(self, whole: list[_Asked]) -> None:
        """Let changes that were not written wait behind the others: one of them may fail each time."""
        for asked in whole:
            self._append_in(0.0 if asked.failed else AGAIN_SECONDS * 2**asked.failures, asked)
            asked.failures = min(MOST_FAILURES, asked.failures + 1)

    def _plan_batch(self) -> Iterator[tuple[_Asked, list[Write]]]:
        """Take from the queue what may be written together, decided; answer what is refused or changes nothing."""
        touched: set[object] = set()
        joined: Counter[str] = Counter()
        ahead = asks = 0
        while self._queue and max(ahead, asks) < TOGETHER:
            asked = self._queue[0]
            if asks and asked.failures:
                return
            planned = self._plan(asked, ahead)
            if planned is None:
                self._queue.popleft()
                continue
            result, changes, keys = planned
            if touched and (keys & touched or self._is_near_limit(joined)):
                return
            self._queue.popleft()
            try:
                records = self._replica.propose(changes, partial(self._landed, asked, changes, result))
                writes = [_write_of(record) for record in records]
            except Exception as error:
                _fail(asked, _as_told(error))
                continue
            touched |= keys
            for change in changes:
                for event in change.events:
                    joined[event.entry.peer.rights.holder] += event.kind == "joined"
            ahead += sum(len(change.events) for change in changes)
            asks += TOGETHER if asked.failures else 1
            yield asked, writes

    def _plan(self, asked: _Asked, ahead: int) -> tuple[Any, list[Change], set[object]] | None:
        """Return a result, the changes that are asked for, and what they touch; None: there are none, or not now."""
        if asked.finished:
            return None
        try:
            result, changes = self._registry.plan(asked.act, ahead)
            changes = [change for change in changes if change.events or change.orders]
            if asked.failed is None and changes:
                changes = _shortened(changes)
            keys = {key for change in changes for key in self._touched_by(change)}
        except Exception as error:
            if isinstance(error, RequestError) and error.error in DOUBTED and not asked.sure:
                self._doubt(asked)
            else:
                _fail(asked, _as_told(error))
            return None
        if changes:
            return result, changes, keys
        asked.finished = True
        _call(asked.done, result)
        return None

    def _append_in(self, seconds: float, asked: _Asked) -> None:
        asyncio.get_running_loop().call_later(seconds, self._append, asked)

    def _append(self, asked: _Asked) -> None:
        self._queue.append(asked)
        self.wake.set()

    def _doubt(self, asked: _Asked) -> None:
        def again() -> None:
            asked.sure = True
            self._append(asked)

        self.when_sure(again, partial(_fail, asked))

    def _landed(self, asked: _Asked, changes: list[Change], result: Any) -> None:
        """Note that changes have been made."""
        for change in changes:
            for event in change.events:
                entry = event.entry
                held = entry.held and entry.peer.id > 0 and event.kind in ("joined", "changed")
                if held and not self.connected(entry.peer):
                    self.make(partial(self._registry.release_held, entry.peer), ignore)
        asked.landed = True
        if not asked.finished and asked.failed is not None:
            asked.finished = True
            _call(asked.done, result)

    def _touched_by(self, change: Change) -> Iterator[object]:
        for event in change.events:
            client = event.entry.client
            yield client.name
            if client.streams:
                yield client.socket_address
            if client.group:
                yield client.group, event.entry.peer.rights.holder
        yield from change.orders

    def _is_near_limit(self, joined: Counter[str]) -> bool:
        most, most_of_holder = self._limits
        return len(self._registry) + joined.total() + 1 > most or any(
            holder and self._registry.count_of_holder(holder) + count + 1 > most_of_holder
            for holder, count in joined.items()
        )

    def _hopeless(self) -> bool:
        return not self.available.is_set() and self._now() > self.unavailable_since + PATIENCE_SECONDS

    def _refuse(self, failed: Callable[[Exception], None], why: str) -> None:
        self.refused += 1
        _call(failed, OSError(errno.EAGAIN, why))

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()


def _as_told(error: Exception) -> Exception:
    """Return an error as who has asked is told of it; a fault of ours is logged."""
    if isinstance(error, RequestError | OSError):
        return error
    log.error("error while a change was decided", reason=repr(error), exc_info=error)
    return OSError(errno.EIO, FAULT)


def _fail(asked: _Asked, error: Exception) -> None:
    """Give up a change; the gateway itself is told that it is over."""
    asked.finished = True
    if asked.failed is None:
        _call(asked.done, None)
    else:
        _call(asked.failed, error)


def _call(callback: Callable[[Any], None], outcome: Any) -> None:
    """Tell who has asked; a fault of ours there costs nobody else, who all wait for the same task."""
    with surviving("error while a change was answered"):
        callback(outcome)


def _shortened(changes: list[Change]) -> list[Change]:
    """Return as much of some changes as fits into a batch; the rest is planned anew behind it."""
    (first, *_) = changes
    events = first.events[: LARGEST_BATCH // 2]
    names = {event.entry.client.name for event in events}
    pasts = {name: past for name, past in first.pasts.items() if name in names}
    return [Change(events, first.orders, pasts, first.generation)]


def _write_of(record: Record) -> Write:
    return Write(key_of(record), encode(record), seconds_of(record))
