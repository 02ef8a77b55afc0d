"""Membership: which nodes live, by the beats that are heard of them. No I/O."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, Literal

from services.uplink.nodes.beats import Beat

BEAT_SECONDS: Final = 0.5
"""Time between two beats of a node."""
SILENT_SECONDS: Final = 2.0
"""A node that is not heard for so long has died, or can't be reached: three beats may be lost."""
DOUBT_SECONDS: Final = 1.0
"""JetStream is asked after so long: whether this node is in the majority is known when others are missed."""
VOTE_SECONDS: Final = 1.0
"""Time for which an acknowledgement of JetStream stands for nodes that are not heard; over before they are missed."""

State = Literal["joining", "live", "left", "silent"]


@dataclass(slots=True)
class _Heard:
    """The last beat of a node, and the time at which it came."""

    beat: Beat
    at: float


class Membership:
    """The nodes as one of them, `own`, hears them."""

    def __init__(self, own: str, nodes: Iterable[str], clock: Callable[[], float] = time.monotonic) -> None:
        self.own = own
        self.others = tuple(node for node in nodes if node != own)
        self.state: Literal["joining", "live"] = "joining"
        """This node's own."""
        self._clock = clock
        self._heard: dict[str, _Heard] = {}
        self._voted_at = float("-inf")

    def note(self, beat: Beat) -> bool:
        """Note a beat; return whether it is of another node, and newer than what was heard of that."""
        known = self._heard.get(beat.node)
        if beat.node not in self.others:
            return False
        if known and known.beat.boot == beat.boot and known.beat.number >= beat.number:
            return False
        self._heard[beat.node] = _Heard(beat, self._clock())
        return True

    def note_vote(self) -> None:
        """Note that JetStream has acknowledged something: it has a majority of its servers, and we hear it."""
        self._voted_at = self._clock()

    def beat(self, node: str) -> Beat | None:
        """Return the last beat of another node; None: none was heard."""
        heard = self._heard.get(node)
        return heard.beat if heard else None

    def seconds_since(self, node: str) -> float | None:
        """Return the time since the last beat of another node; None: none was heard."""
        heard = self._heard.get(node)
        return self._clock() - heard.at if heard else None

    def state_of(self, node: str) -> State:
        """Return the state of a node."""
        if node == self.own:
            return self.state
        heard = self._heard.get(node)
        return "silent" if heard is None or self._is_missed(node, SILENT_SECONDS) else heard.beat.state

    def _is_missed(self, node: str, seconds: float) -> bool:
        """Return whether another node was not heard for so long. One that has said that it leaves is not missed."""
        heard = self._heard.get(node)
        return heard is None or (heard.at <= self._clock() - seconds and heard.beat.state != "left")

    @property
    def live(self) -> list[str]:
        """The nodes that serve collectors."""
        return sorted(node for node in (self.own, *self.others) if self.state_of(node) == "live")

    @property
    def hears_most(self) -> bool:
        """True if most nodes are heard, this one among them."""
        return self._hears_most(SILENT_SECONDS)

    @property
    def in_doubt(self) -> bool:
        """True if JetStream is to be asked for a majority: most nodes may not be heard any more."""
        return not self._hears_most(DOUBT_SECONDS)

    def _hears_most(self, seconds: float) -> bool:
        return 2 * sum(self._is_missed(node, seconds) for node in self.others) < 1 + len(self.others)

    @property
    def majority(self) -> bool:
        """True if most nodes are heard, or JetStream stands in for those that are not."""
        return self.hears_most or self._clock() < self._voted_at + VOTE_SECONDS
