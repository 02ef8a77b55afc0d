"""Readers of what this host's bus gets from other sites: how far each has got, as its reports tell. No I/O.

After an outage all comes at once that other sites have sent meanwhile. Queues of the bus drop what a slow reader does
not take in time, and JetStream keeps it at no cost. So what is late is published only as far as all readers follow.
"""

from collections import defaultdict, deque
from typing import Final

from shared.bus.messages import Status
from shared.ledger.accounts import is_origin, parse_origin
from shared.ledger.counters import REACHED

LATE_NS: Final = 1_000_000_000
"""Age from which a batch is late: queues have room for what comes in so long a time."""
AHEAD: Final = 64
"""Messages that a reader may be behind: a fraction of what its queue holds."""
MOST_KNOWN: Final = 4096
PATIENCE_SECONDS: Final = 3.0
"""Time after which a reader that gets no further is not waited for."""


class Readers:
    """Follows those who read what this process publishes as `sender`, started as `boot`."""

    def __init__(self, sender: str, boot: int) -> None:
        self._own = sender, boot
        self._reached: defaultdict[str, dict[str, int]] = defaultdict(dict)
        """By stream and reader: the count that it has reached."""
        self._left_behind: defaultdict[str, set[str]] = defaultdict(set)
        """By stream: readers that are not waited for, until they get further."""
        self._unread: set[str] = set()
        """Streams of which no reader has told anything."""
        self._ends: defaultdict[str, deque[int]] = defaultdict(lambda: deque(maxlen=MOST_KNOWN))
        """By stream: our count behind each of the last messages."""

    def note_report(self, reader: str, status: Status) -> None:
        """Note how far a reader has got."""
        for name, account in status.accounts.items():
            if is_origin(name) and parse_origin(name)[:2] == self._own:
                stream, reached = parse_origin(name)[2], account.get(REACHED, 0)
                if self._reached[stream].get(reader) != reached:
                    self._reached[stream][reader] = reached
                    self._left_behind[stream].discard(reader)
                self._unread.discard(stream)

    def note_published(self, stream: str, total: int) -> None:
        """Note a message behind which our count is `total`."""
        self._ends[stream].append(total)

    def follow(self, stream: str) -> bool:
        """Return whether all readers are near enough."""
        ends, away = self._ends[stream], self._left_behind[stream]
        waited_for = [reached for reader, reached in self._reached[stream].items() if reader not in away]
        if stream in self._unread or (self._reached[stream] and not waited_for):
            return True
        while ends and waited_for and ends[0] <= min(waited_for):
            ends.popleft()
        return len(ends) < AHEAD

    def leave_behind(self, stream: str) -> None:
        """Wait for no reader any more that has not got further for so long."""
        if not self._reached[stream]:
            self._unread.add(stream)
        last = self._ends[stream][-1]
        self._left_behind[stream] |= {reader for reader, reached in self._reached[stream].items() if reached < last}
