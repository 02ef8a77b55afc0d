"""Events for watchers: every change of the registry as a line, in order, none left out and none twice. No I/O."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final, TypeVar

from services.gateway.fault_guard import surviving
from services.gateway.registry.condition import Word
from services.gateway.registry.entry import Entry, Event
from services.gateway.registry.registry import Registry
from shared.log import COLLECTOR_HEALTH, get_logger, suppressed
from shared.process.log_limit import LogBudget

KEPT_BYTES: Final = 4 * 1024 * 1024
"""Bytes of past events, for watchers that come back: some 10,000 events."""

TOLD_AT_ONCE: Final = 2000
"""Collectors whose health is pushed together: all at once would exceed the limit of what may wait for a watcher."""

SETTLE_SECONDS: Final = 10.0
"""A collector that was served for less than this, and waits, is no reason to warn: its services are being started."""

PUSHED_AT_ONCE: Final = 32 * 1024
"""Bytes: each piece is copied for each watcher that does not take it at once."""

log = get_logger()

T = TypeVar("T")
Push = Callable[[bytes], None]
"""Takes whole lines that answer no request."""


class EventFeed:
    """Pushes the events of the registry to every watcher, each rendered once; keeps some for those that come back."""

    def __init__(
        self, registry: Registry, render: Callable[[Event], bytes], render_health: Callable[[Entry], bytes]
    ) -> None:
        self._registry = registry
        self._render = render
        self._render_health = render_health
        self._watchers: dict[int, Push] = {}
        self._words: dict[str, tuple[Word, float]] = {}
        """By collector that has been served: the last word, as it was logged, and its start."""
        self._budget = LogBudget()
        self._past: deque[tuple[int, bytes]] = deque()
        self._past_bytes = 0
        self._begin = self._shown = registry.revision
        """The revision before the first of the past events, and the last one that anybody was shown."""

    def __len__(self) -> int:
        return len(self._watchers)

    def add_watcher(self, peer: int, push: Push) -> None:
        """Push every event from now on to this peer."""
        self.push_events()
        self._watchers[peer] = push

    def has_watcher(self, peer: int) -> bool:
        """Return whether this peer watches."""
        return peer in self._watchers

    def remove_watcher(self, peer: int) -> None:
        """Push nothing more to this peer."""
        self._watchers.pop(peer, None)

    def lines_since(self, revision: int) -> bytes | None:
        """Return the lines of all events after `revision`; None when they are no longer known, or not yet."""
        self.push_events()
        if not self._begin <= revision <= self._registry.revision:
            return None
        return b"".join(line for number, line in self._past if number > revision)

    def push_events(self) -> None:
        """Push the events since the last call."""
        events = self._registry.pop_events()
        for event in events:
            if event.kind in ("left", "expired"):
                self._words.pop(event.entry.client.name, None)
        lines = self._lines(self._render, events)
        self._remember(events, lines)
        self._shown = self._registry.revision
        self._push(lines)

    def pop_waiting(self, peer: int) -> list[bytes]:
        """Push the events since the last call; return those for this peer, which gets them before an answer."""
        push, waiting = self._watchers.get(peer), list[bytes]()
        if push:
            self._watchers[peer] = waiting.append
        self.push_events()
        if push:
            self._watchers[peer] = push
        return waiting

    def push_health(self) -> None:
        """Push the words of collectors that have changed since the last call; they are not kept."""
        self._registry.refresh_conditions()
        self.push_events()  # the event that a collector has joined comes first
        changed = self._registry.pop_changed_words(TOLD_AT_ONCE)
        for entry in changed:
            self._log(entry)
        if changed and self._watchers:
            self._push(self._lines(self._render_health, changed))

    def _log(self, entry: Entry) -> None:
        """Log a word that is a trouble, or the end of one."""
        name, word, since, lost = entry.client.name, entry.condition.word, entry.condition.since, entry.condition.lost
        before, began = self._words.get(name, (None, since))
        if word == "fresh" or (word == "waiting" and before is None):
            return  # it is not served yet
        self._words[name] = word, since
        if word == before or (word == "ok" and before is None):
            return
        expected = word in ("ok", "withheld") or (word == "waiting" and since < began + SETTLE_SECONDS)
        if count := self._budget.admit():
            (log.info if expected else log.warning)(
                COLLECTOR_HEALTH, of=name, health=word, before=before, lost=lost, **suppressed(count)
            )

    def health_lines(self) -> bytes:
        """Return a line for every collector that is not well now."""
        entries = self._registry.entries()
        unwell = [entry for entry in entries if entry.condition.word != "ok"]
        return b"".join(self._lines(self._render_health, unwell))

    def _lines(self, render: Callable[[T], bytes], shown: Iterable[T]) -> list[bytes]:
        """Return a line for each event or word; an empty one for what can't be rendered: the others are shown."""
        lines = []
        for each in shown:
            lines.append(b"")
            with surviving("error while an event was rendered"):
                lines[-1] = render(each)
        return lines

    def _push(self, lines: Sequence[bytes]) -> None:
        for batch in _batches(lines):
            for push in list(self._watchers.values()):
                push(batch)

    def _remember(self, events: Sequence[Event], lines: Sequence[bytes]) -> None:
        for event, line in zip(events, lines, strict=True):
            if not line or event.revision <= self._shown:
                # Some that have its revision may lack the event: only the whole list helps those that come back.
                self._past.clear()
                self._past_bytes, self._begin = 0, event.revision + 1
                continue
            self._past.append((event.revision, line))
            self._past_bytes += len(line)
            self._shown = event.revision
        while self._past_bytes > KEPT_BYTES:
            self._begin, line = self._past.popleft()
            self._past_bytes -= len(line)


def _batches(lines: Sequence[bytes]) -> Iterator[bytes]:
    """Yield lines joined to batches of about `PUSHED_AT_ONCE` bytes."""
    batch: list[bytes] = []
    size = 0
    for line in lines:
        batch.append(line)
        size += len(line)
        if size >= PUSHED_AT_ONCE:
            yield b"".join(batch)
            batch, size = [], 0
    if batch:
        yield b"".join(batch)
