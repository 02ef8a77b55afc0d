"""Comparison of the marks that rules have set with those that ingest has read. No I/O; the clock is handed in.

A rule of another program that sets a whole mark takes ours away. The senders would then send what the kernel has sent.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

UNREAD: Final = 16
"""Marks in a row of which none has come: fewer may be datagrams that the host's firewall drops, or wrong checksums."""
UNMARKED_SHARE: Final = 2
"""Of these marks one in this many at least has to have come as a datagram without: a firewall may drop the others."""
UNREAD_SECONDS: Final = 3.0
"""Time between them and reports of all workers without any of them: these come each second, later on a busy host."""
AGAIN_SECONDS: Final = 600.0
"""Time after which the rules are tried again."""


@dataclass(slots=True)
class _Stream:
    """The counts when marks came last, and since when so many more are set that some should come."""

    marked: int
    read: int
    received: int
    since: float = math.inf


class MarkWatch:
    """Follows the counts of each stream; `reason` says of which one marks are taken away."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._streams: dict[str, _Stream] = {}
        self._until = self._steady_since = 0.0
        self.reason = ""

    def note(
        self,
        marked: Mapping[str, int],
        read: Mapping[str, int],
        received: Mapping[str, int],
        reporting: tuple[float, float],
    ) -> bool:
        """Note what the rules have marked, and what workers had read of it, or dropped, as of their last reports.

        `received` is what workers had received, marked or not: a mark that was taken away leaves its datagram, while
        one that waits at the socket of a worker that stands still has come to nobody. All are counts since any time in
        the past. `reporting`: the time since which all workers report steadily, and the time up to which each has
        reported. What was marked while one did not says nothing: it may be restarted, or kept from the CPU. Return
        whether `reason` has changed.
        """
        now, before = self._clock(), self.reason
        steady_since, reported_at = reporting
        if self.reason and now >= self._until:
            self.reason = ""
            self._streams.clear()
        if steady_since != self._steady_since:
            self._steady_since = steady_since
            self._streams.clear()
        for stream, count in marked.items():
            known = self._streams.get(stream)
            if known is None or read.get(stream, 0) != known.read or count < known.marked:
                self._streams[stream] = _Stream(count, read.get(stream, 0), received.get(stream, 0))
            elif UNREAD <= count - known.marked <= (received.get(stream, 0) - known.received) * UNMARKED_SHARE:
                known.since = min(known.since, now)
                if reported_at >= known.since + UNREAD_SECONDS and not self.reason:
                    self.reason = f"another program takes the marks of stream {stream} away; see [offload] mark_mask"
                    self._until = now + AGAIN_SECONDS
        return before != self.reason
