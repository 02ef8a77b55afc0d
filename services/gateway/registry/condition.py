"""How collectors do: what the bus says of their copies, and when a collector's word changes. No I/O."""

from dataclasses import dataclass, field
from typing import Literal

from shared.bus.messages import Health
from shared.client import Trouble

Word = Literal["fresh", "ok", "waiting"] | Trouble
"""Of a collector's copies: not asked for yet, flowing, nobody said so in time, or what who sends them says."""


@dataclass(frozen=True, slots=True)
class Condition:
    """A collector's word, since when on the registry's clock, and how many datagrams it has cost."""

    word: Word
    since: float
    count: int = 0


@dataclass(slots=True)
class Serving:
    """What is known of the copies of one source, as revisions of the registry; -1: of none."""

    newest: int = -1
    """The last in which a collector joined."""
    served: int = -1
    """Copies flow to every collector of this one."""
    unanswered: int = -1
    """Nobody said in time that copies flow to those of this one."""
    reported: int = 0
    """Grows with every change of `_conditions`."""
    _conditions: dict[tuple[str, int], Condition] = field(default_factory=dict)
    """By name and generation, of those that have a trouble."""
    _pieces: list[Health] = field(default_factory=list)
    _pieces_of: tuple[int, int] = (-1, -1)

    @property
    def complete(self) -> bool:
        """Whether copies flow to every collector there is."""
        return self.newest <= self.served

    def note_served(self, revision: int) -> None:
        """Copies flow to every collector of `revision`."""
        self.served = max(self.served, revision)

    def note_unanswered(self, revision: int) -> None:
        """Nobody said in time that copies flow to the collectors of `revision`."""
        self.unanswered = max(self.unanswered, revision)

    def note_health(self, boot: int, body: Health, now: float) -> None:
        """Who sends the copies, started as `boot`, has said which collectors have a trouble; the last word counts."""
        if body.piece == 0:
            self._pieces, self._pieces_of = [], (boot, body.report)
        if body.piece != len(self._pieces) or self._pieces_of != (boot, body.report):
            return  # a piece was lost: wait for the next list
        self._pieces.append(body)
        if len(self._pieces) < body.pieces:
            return
        conditions = {
            (each.name, each.generation): Condition(each.trouble, now - each.age_ms / 1000, each.count)
            for piece in self._pieces
            for each in piece.troubled
        }
        self._pieces = []
        if conditions or self._conditions:
            self._conditions = conditions
            self.reported += 1

    def forget(self) -> None:
        """Who sent the copies has gone: nothing is known to be served until somebody says so again."""
        self.note_unanswered(self.served)
        self.served = -1
        self._conditions, self._pieces_of = {}, (-1, -1)
        self.reported += 1

    def word(self, revision: int) -> Literal["fresh", "ok", "waiting"]:
        """Whether the copies of a collector flow that joined in `revision`."""
        if revision <= self.served:
            return "ok"
        return "waiting" if revision <= self.unanswered else "fresh"

    def trouble(self, name: str, generation: int) -> Condition | None:
        """What was said last of a collector, if it has a trouble."""
        return self._conditions.get((name, generation))
