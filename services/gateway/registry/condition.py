"""Condition of collectors: what the services that send copies say of them, and since when. No I/O."""

from dataclasses import dataclass, field
from typing import Literal

from shared.bus.messages import Health
from shared.bus.pieces import Assembler
from shared.client import Trouble

Word = Literal["fresh", "ok", "waiting"] | Trouble
"""Of a collector's copies: nobody asked yet, they flow, no answer came in time, or the trouble that was reported."""


@dataclass(frozen=True, slots=True)
class Condition:
    """A collector's word, since when on the registry's clock, and how many datagrams it has cost."""

    word: Word
    since: float
    count: int = 0


@dataclass(slots=True)
class Serving:
    """Knowledge of the copies of one source, as revisions of the registry; -1: of none."""

    newest: int = -1
    """The last in which a collector joined."""
    served: int = -1
    """Copies flow to every collector of this one."""
    unanswered: int = -1
    """No answer came in time for the collectors of this one."""
    reported: int = 0
    """Grows with every change of `_conditions`."""
    _conditions: dict[tuple[str, int], Condition] = field(default_factory=dict)
    """By name and generation, of those that have a trouble."""
    _assembler: Assembler[Health] = field(default_factory=Assembler)

    @property
    def complete(self) -> bool:
        """Whether copies flow to every collector there is."""
        return self.newest <= self.served

    def note_served(self, revision: int) -> None:
        """Note that copies flow to every collector of `revision`."""
        self.served = max(self.served, revision)

    def note_unanswered(self, revision: int) -> None:
        """Note that no answer came in time for the collectors of `revision`."""
        self.unanswered = max(self.unanswered, revision)

    def note_health(self, boot: int, body: Health, now: float) -> None:
        """Note the collectors in trouble, as the service started as `boot` reports them; the last report counts."""
        pieces = self._assembler.add((boot, body.report), body)
        if pieces is None:
            return
        conditions = {
            (each.name, each.generation): Condition(each.trouble, now - each.age_ms / 1000, each.count)
            for piece in pieces
            for each in piece.troubled
        }
        if conditions or self._conditions:
            self._conditions = conditions
            self.reported += 1

    def forget(self) -> None:
        """Forget what was reported, since the service has gone: nothing is served until one says so again."""
        self.note_unanswered(self.served)
        self.served = -1
        self._conditions = {}
        self._assembler.clear()
        self.reported += 1

    def word(self, revision: int) -> Literal["fresh", "ok", "waiting"]:
        """Return whether copies flow to a collector that joined in `revision`."""
        if revision <= self.served:
            return "ok"
        return "waiting" if revision <= self.unanswered else "fresh"

    def trouble(self, name: str, generation: int) -> Condition | None:
        """Return the last report of a collector, if it is in trouble."""
        return self._conditions.get((name, generation))
