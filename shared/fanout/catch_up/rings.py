"""The windows of live batches, by stream: while collectors catch up, and in a cluster at any time.

In a cluster each sender keeps a *ring*: the latest batches of every stream that collectors of any node want. One that
is taken over from another node goes on from there.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Final

from shared.bus.messages import Datagrams, Envelope, Status
from shared.datagrams.batch import DatagramBatch
from shared.fanout.catch_up.journal_questions import JournalReports
from shared.fanout.catch_up.window import SECONDS, Numbered, Window
from shared.process.memory import MUCH, Memory

RING_SECONDS: Final = 12.0
"""Time for which a ring keeps a batch: a node is missed after two seconds, and last told its place before."""
ALL_BYTES: Final = 192 << 20
"""Bytes that the windows of all streams take at most; the largest is the first to let go."""


class Rings:
    """Windows, made where they are needed."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._windows: dict[str, Window] = {}
        self._rings: frozenset[str] = frozenset()
        """Streams whose window is kept at any time."""
        self._open: set[str] = set()
        """Streams on which somebody catches up."""
        self._journaled: frozenset[str] = frozenset()
        self._reports = JournalReports()

    def __getitem__(self, stream: str) -> Window:
        return self._windows[stream]

    @property
    def kept(self) -> frozenset[str]:
        """The streams that have a ring."""
        return self._rings

    def keep(self, streams: Iterable[str]) -> None:
        """Keep a ring of these streams from now on, and of no others."""
        self._rings = frozenset(streams)
        self._settle()

    def use(self, journaled: Iterable[str]) -> None:
        """Note which streams have a journal."""
        self._journaled = frozenset(journaled)
        self._settle()

    def open(self, stream: str) -> None:
        """Keep what comes of a stream, as somebody catches up on it."""
        self._open.add(stream)
        self._settle()

    def close(self, stream: str) -> None:
        """Let go of a stream's batches that nobody needs to catch up, unless it has a ring."""
        self._open.discard(stream)
        self._windows[stream].forget({})
        self._settle()

    def _settle(self) -> None:
        """Make and let go of windows as they are needed, and say how long they keep a batch."""
        wanted = self._rings | self._open
        self._windows = {stream: self._windows.get(stream) or Window(self._clock) for stream in wanted}
        for stream, window in self._windows.items():
            window.seconds = RING_SECONDS if stream in self._rings else SECONDS
            window.journaled = stream in self._journaled & self._open

    def add(self, envelope: Envelope, body: Datagrams, batch: DatagramBatch) -> Numbered | None:
        """Keep a live batch, and return it with its numbers; None: there is no window for it."""
        window = self._windows.get(batch.stream)
        if window is None:
            return None
        if body.chunk is not None:  # its memory is the worker's
            batch = replace(batch, payload=bytes(batch.payload))
        numbered = Numbered((envelope.sender, envelope.boot), envelope.sequence, envelope.total, batch)
        window.add(numbered)
        if (over := self.size - ALL_BYTES) > 0:
            largest = max(self._windows.values(), key=lambda each: each.size)
            largest.trim(largest.size - over)
        return numbered

    @property
    def size(self) -> int:
        """Bytes that all windows take, about."""
        return sum(each.size for each in self._windows.values())

    def halve(self, memory: Memory) -> bool:
        """Let go of the oldest, as the process is short of memory; return False where that would hardly help."""
        if helps := self.size >= MUCH:
            for window in self._windows.values():
                window.trim(window.size // 2)
            memory.note_freed()
        return helps

    def confirm(self, envelope: Envelope, status: Status) -> None:
        """Note what the journal has, as its status tells."""
        told = self._reports.read(envelope, status)
        for stream, window in self._windows.items():
            window.confirm(*told(stream))

    def items(self) -> Iterator[tuple[str, Window]]:
        """Yield each stream's window."""
        yield from self._windows.items()
