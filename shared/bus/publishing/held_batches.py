"""Batches held for a sender of copies that is being restarted, so that its successor gets what came meanwhile.

A sender that ends asks for it by a subscription, and its successor asks for the batches by another one
(`shared.fanout.resumption`). For a journal the latest batches of its streams stand, since it may be killed: it has that
subscription from its start. At other times nothing is held.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from shared.bus.endpoint import PLACE
from shared.bus.messages import HOLD_PREFIX, Again, Datagrams, again_topic, datagrams_topic, hold_topic
from shared.bus.zmq_sockets import Publisher

HOLD_SECONDS: Final = 15.0
"""Time for a restart: a sender ends within 4 s, and its successor has to start."""
MAX_HELD: Final = 32 << 20
"""Bytes held for one sender; the oldest batches go first."""
BATCH_OVERHEAD: Final = 512
"""Bytes that a held batch takes beyond its columns and payloads, about."""
MAX_SENDERS: Final = 16
"""Senders for which batches are held at once; who asks later gets nothing. There are two, and some may follow them."""
PORTION_SHARE: Final = 4
"""A portion is one part in this many of what the queues on the way hold: live batches need them too."""
RETRY_SECONDS: Final = 0.01
STANDING_SECONDS: Final = 1.0
"""Time by which a batch that stands may be let go late."""
JOURNAL: Final = "journal."
"""Begins the name of a journal, for which batches stand."""
END: Final = "end"
"""The stream that the end of a portion names."""


class _Batch(NamedTuple):
    """A batch as it was published: `sequence` and `total` are those of its message, `size` the bytes that it takes."""

    body: Datagrams
    sequence: int
    total: int
    rows: bytes
    payload: bytes
    held_at: float
    size: int


@dataclass(slots=True)
class _Held:
    """The batches of these streams that one sender gets, oldest first; `asked_for` while its successor wants some."""

    streams: frozenset[str] = frozenset()
    until: float = 0.0
    asked_for: bool = False
    standing: bool = False
    """The latest batches are held at any time, for a journal that may be killed."""
    size: int = 0
    batches: deque[_Batch] = field(default_factory=deque)
    handed_on: int = 0
    """Of those that stand, the number that were handed on already."""


class HeldBatches:
    """Batches held for senders of copies. `due_at` is the time at which there is more to do, None: nothing is held."""

    def __init__(self, publisher: Publisher, queue_limit: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        self.due_at: float | None = None
        self.whole = False
        """Everything is held, whatever its size: no payload is to be lent."""
        self._publisher = publisher
        self._portion = max(1, queue_limit // PORTION_SHARE)
        self._clock = clock
        self._journaled: frozenset[str] = frozenset()
        self._held: dict[str, _Held] = {}
        """By the name of the sender."""
        self._streams: frozenset[str] = frozenset()
        """All streams of which batches are held."""

    def wants(self, stream: str) -> bool:
        """Return whether batches of a stream are held."""
        return stream in self._streams

    def note_journaled(self, streams: Iterable[str]) -> None:
        """Note the streams that a journal keeps."""
        self._journaled = frozenset(streams)
        for held in self._held.values():
            held.streams = self._journaled if held.standing else held.streams
        self._note_held()

    def _note_held(self) -> None:
        """Sum up for what is asked with each batch."""
        self._streams = frozenset[str]().union(*(held.streams for held in self._held.values()))
        self.whole = any(not held.standing for held in self._held.values())

    def heed(self, prefixes: Iterable[str], streams: Iterable[str]) -> None:
        """Heed new subscriptions: those that ask to hold these streams, and those that ask for what is held."""
        asking = again_topic(self._publisher.sender, "")[:-1]
        for prefix in prefixes:
            if name := _name_behind(HOLD_PREFIX, prefix):
                held = self._of(name)
                held.standing = name.startswith(JOURNAL)
                held.streams = self._journaled if held.standing else frozenset(streams)
                held.handed_on = 0  # to another one, which was killed
            elif name := _name_behind(asking, prefix):
                self._of(name).asked_for = True
        self._note_held()

    def _of(self, name: str) -> _Held:
        """Return what is held for a sender; beyond the limit what is forgotten at once."""
        held = self._held.get(name, _Held())
        if name in self._held or len(self._held) < MAX_SENDERS:
            self._held[name] = held
            self.due_at = self._clock()
        held.until = self._clock() + HOLD_SECONDS
        return held

    def add(self, body: Datagrams, count: int, rows: bytes, payload: bytes) -> None:
        """Hold a batch that has just been published, unless nobody wants it held."""
        stream = body.stream
        sequence, total = self._publisher.position(datagrams_topic(stream))
        size = BATCH_OVERHEAD + len(rows) + len(payload)
        batch = _Batch(body, sequence - 1, total - count, rows, payload, self._clock(), size)
        for held in self._held.values():
            if stream in held.streams:
                held.batches.append(batch)
                held.size += size
                while held.size > MAX_HELD:
                    _drop_oldest(held)

    def hand_on(self, *, short: bool) -> None:
        """Hand on a portion of what is asked for; let go of the rest in time, or when memory is `short`."""
        now, self.due_at = self._clock(), None
        for name, held in list(self._held.items()):
            if short:
                held.batches.clear()
                held.size = held.handed_on = 0
            if held.standing:
                self._look_after(name, held, now)
            elif (held.asked_for and self._publish(name, held)) or held.until <= now:
                del self._held[name]
            else:
                due_at = now + RETRY_SECONDS if held.asked_for else held.until
                self.due_at = min(due_at, self.due_at or due_at)
        self._note_held()

    def _look_after(self, name: str, held: _Held, now: float) -> None:
        """Hand on what is asked for of batches that stand, and let go of old ones; of all when nobody wants them."""
        if self._publisher.wanted(hold_topic(name)):
            held.until = now + HOLD_SECONDS
        while held.batches and held.batches[0].held_at <= now - HOLD_SECONDS:
            _drop_oldest(held)
        if held.asked_for:
            self._publish(name, held)
        if held.until <= now:
            del self._held[name]
            return
        due_at = now + (RETRY_SECONDS if held.asked_for else STANDING_SECONDS)
        self.due_at = min(due_at, self.due_at or due_at)

    def _publish(self, name: str, held: _Held) -> bool:
        """Publish a portion and its end; return whether nothing is left. A full queue makes it try again."""
        topic = again_topic(self._publisher.sender, name)
        places = 0
        while places < self._portion and held.handed_on < len(held.batches):
            batch = held.batches[held.handed_on]
            places += 1 + batch.size // PLACE
            body = batch.body
            again = Again(body.stream, body.received_ns, generation=body.generation, generations=body.generations)
            if not self._publisher.repeat(topic, again, batch.sequence, batch.total, (batch.rows, batch.payload)):
                return False
            if held.standing:
                held.handed_on += 1
            else:
                _drop_oldest(held)
        left = len(held.batches) - held.handed_on
        held.asked_for = not self._publisher.repeat(topic, Again(END, 0, left=left), 0, 0, (b"", b""))
        if not left and not held.asked_for:
            held.handed_on = 0
        return not left and not held.asked_for


def _drop_oldest(held: _Held) -> None:
    held.size -= held.batches.popleft().size
    if held.handed_on:
        held.handed_on -= 1


def _name_behind(beginning: str, prefix: str) -> str:
    return prefix.removeprefix(beginning).removesuffix("/") if prefix.startswith(beginning) else ""
