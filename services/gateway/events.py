"""What watchers get: every change of the registry as a line, in order, none left out and none twice. No I/O."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from services.gateway.registry.entry import Entry, Event
from services.gateway.registry.registry import Registry

KEPT_BYTES: Final = 4 * 1024 * 1024
"""Of past events, for who comes back: some 10,000 of them."""

TOLD_AT_ONCE: Final = 2000
"""Collectors whose health is told together: with all of them what waits for a watcher would exceed its bound."""

PUSHED_AT_ONCE: Final = 32 * 1024
"""Bytes: what is handed over is copied for each watcher that does not take it at once."""

Push = Callable[[bytes], None]
"""Takes whole lines that answer no request."""


class EventFeed:
    """The registry's events to everybody who watches, each rendered once."""

    def __init__(
        self, registry: Registry, render: Callable[[Event], bytes], render_health: Callable[[Entry], bytes]
    ) -> None:
        self._registry = registry
        self._render = render
        self._render_health = render_health
        self._watchers: dict[int, Push] = {}
        self._past: deque[tuple[int, bytes]] = deque()
        self._past_bytes = 0
        self._begin = registry.commit()
        """The revision before the first of the past events."""

    def __len__(self) -> int:
        return len(self._watchers)

    def watch(self, peer: int, push: Push) -> None:
        """Push what happens from now on to this peer."""
        self.flush()
        self._watchers[peer] = push

    def watches(self, peer: int) -> bool:
        """Whether this peer watches."""
        return peer in self._watchers

    def leave(self, peer: int) -> None:
        """Push nothing more to this peer."""
        self._watchers.pop(peer, None)

    def since(self, revision: int) -> bytes | None:
        """The lines of all events after `revision`; None when they are not known any more, or not yet."""
        self.flush()
        if not self._begin <= revision <= self._registry.commit():
            return None
        return b"".join(line for number, line in self._past if number > revision)

    def flush(self) -> None:
        """Push what has happened since the last time."""
        events = self._registry.pop_events()
        if not events:
            return
        lines = [self._render(event) for event in events]
        self._remember(events, lines)
        self._push(lines)

    def push_health(self) -> None:
        """Push what has become of collectors since the last time; it is no change of the list, and not kept."""
        self._registry.refresh_conditions()
        self.flush()  # that a collector has joined comes first
        changed = self._registry.pop_changed_words(TOLD_AT_ONCE)
        if changed and self._watchers:
            self._push([self._render_health(entry) for entry in changed])

    def health(self) -> bytes:
        """A line for every collector that is not well now."""
        entries = self._registry.entries()
        return b"".join(self._render_health(entry) for entry in entries if entry.condition.word != "ok")

    def _push(self, lines: Sequence[bytes]) -> None:
        for piece in _pieces(lines):
            for push in list(self._watchers.values()):
                push(piece)

    def _remember(self, events: Sequence[Event], lines: Sequence[bytes]) -> None:
        for event, line in zip(events, lines, strict=True):
            self._past.append((event.revision, line))
            self._past_bytes += len(line)
        while self._past_bytes > KEPT_BYTES:
            self._begin, line = self._past.popleft()
            self._past_bytes -= len(line)


def _pieces(lines: Sequence[bytes]) -> Iterator[bytes]:
    """Join lines to pieces of about `PUSHED_AT_ONCE` bytes."""
    piece: list[bytes] = []
    size = 0
    for line in lines:
        piece.append(line)
        size += len(line)
        if size >= PUSHED_AT_ONCE:
            yield b"".join(piece)
            piece, size = [], 0
    if piece:
        yield b"".join(piece)
