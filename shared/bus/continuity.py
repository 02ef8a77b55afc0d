"""Gaps, repeats and restarts, by sender and topic: they tell a message that was missed from one that was never sent."""

from dataclasses import dataclass
from typing import Final

from shared.bus.messages import Envelope

MAX_POSITIONS: Final = 4096
"""Bounds the table against a bus full of made-up senders; the longest known goes first."""

MAX_GAP: Final = 1 << 40
"""Datagrams: more than any worker publishes while nobody listens. A sender that claims it is followed anew."""

Worker = tuple[str, int]
"""Name and boot id of a worker."""
Origin = tuple[str, int, str]
"""Sender, boot id, topic. A restarted sender is another origin, so its count from zero is no loss."""


@dataclass(slots=True)
class Position:
    """The place that a subscriber has reached in one origin's running count of datagrams."""

    next_sequence: int
    baseline: int
    reached: int
    taken: int = 0
    missed: int = 0
    unserved: int = 0
    """Datagrams that were published while the subscriber itself was away."""


class Continuity:
    """Follows the sequence and running count of every origin."""

    def __init__(self) -> None:
        self.positions: dict[Origin, Position] = {}
        self.repeated = 0

    def observe(self, topic: str, envelope: Envelope, count: int) -> int | None:
        """Take note of a message with `count` datagrams; return datagrams missed before it, None for a repeat."""
        origin = (envelope.sender, envelope.boot, topic)
        position = self.positions.get(origin)
        if position is None or envelope.total - position.reached > MAX_GAP:
            if len(self.positions) >= MAX_POSITIONS:
                del self.positions[next(iter(self.positions))]
            position = self.positions[origin] = Position(envelope.sequence, envelope.total, envelope.total)
        elif envelope.sequence < position.next_sequence or envelope.total < position.reached:
            self.repeated += 1
            return None
        missed = envelope.total - position.reached
        position.missed += missed
        position.taken += count
        position.next_sequence, position.reached = envelope.sequence + 1, envelope.total + count
        return missed

    def reconcile(self, origin: Origin, published: int) -> int:
        """Note the number of datagrams that `origin` says it has published; return datagrams missed at the end.

        The number comes on the same connection as the datagrams, behind them, so what has not come by then is lost. A
        gap at the end, which no later message shows, is found this way.
        """
        position = self.positions.get(origin)
        if position is None or not 0 < published - position.reached <= MAX_GAP:
            return 0
        missed = published - position.reached
        position.missed += missed
        position.reached = published
        return missed

    def forget(self, topic: str) -> None:
        """Forget a topic that is no longer subscribed to: nothing that passes meanwhile counts as missed."""
        self.positions = {origin: position for origin, position in self.positions.items() if origin[2] != topic}
