"""Condition of collectors: the last report of the services that send copies, and its age. No I/O."""

from dataclasses import dataclass, field
from typing import Literal

from shared.bus.bodies.health_message import Health
from shared.bus.pieces import Assembler
from shared.client import Client, Trouble

Word = Literal["fresh", "ok", "waiting", "withheld", "elsewhere"] | Trouble
"""State of a collector's copies, in this order: nobody was asked for them yet, they flow, no answer came in time, an
admin withholds them, another node serves the collector; or the reported trouble."""


@dataclass(frozen=True, slots=True)
class Condition:
    """A collector's word, its start on the registry's clock, and how many of its datagrams have reached nobody."""

    word: Word
    since: float
    lost: int = 0


@dataclass(slots=True)
class Serving:
    """Knowledge of the copies of one source, as revisions of the registry; -1: of none."""

    newest: int = -1
    """The last revision in which a collector joined."""
    served: int = -1
    """Copies flow to every collector of this revision."""
    unanswered: int = -1
    """No answer came in time for the collectors of this revision."""
    reported: int = 0
    """Grows with every change of `_conditions`."""
    _conditions: dict[tuple[str, int], Condition] = field(default_factory=dict)
    """By name and generation, for collectors that have a trouble."""
    _lost: dict[tuple[str, int], int] = field(default_factory=dict)
    """Likewise, for collectors that have lost datagrams."""
    _assembler: Assembler[Health] = field(default_factory=Assembler)

    def note_served(self, revision: int) -> None:
        """Note that copies flow to every collector of `revision`."""
        self.served = max(self.served, revision)

    def note_unanswered(self, revision: int) -> None:
        """Note that no answer came in time for the collectors of `revision`."""
        self.unanswered = max(self.unanswered, revision)

    def note_health(self, boot: int, body: Health, now: float) -> None:
        """Note troubles and losses, as the service started as `boot` reports them; the last report counts."""
        pieces = self._assembler.add((boot, body.report), body)
        if pieces is None:
            return
        told = [each for piece in pieces for each in piece.troubled]
        lost = {(each.name, each.generation): each.lost for each in told if each.lost}
        conditions = {
            (each.name, each.generation): Condition(each.trouble, now - each.age_ms / 1000, each.lost)
            for each in told
            if each.trouble
        }
        if conditions or self._conditions or lost != self._lost:
            self._conditions, self._lost = conditions, lost
            self.reported += 1

    def forget(self) -> None:
        """Forget all reports, since the service has gone: nothing is served until a service says so again."""
        self.note_unanswered(self.served)
        self.served = -1
        self._conditions, self._lost = {}, {}
        self._assembler.clear()
        self.reported += 1

    def word(self, revision: int) -> Literal["fresh", "ok", "waiting"]:
        """Return the word for copies to a collector that joined in `revision`."""
        if revision <= self.served:
            return "ok"
        return "waiting" if revision <= self.unanswered else "fresh"

    def trouble(self, name: str, generation: int) -> Condition | None:
        """Return the last report of a collector, if it is in trouble."""
        return self._conditions.get((name, generation))

    def lost(self, name: str, generation: int) -> int:
        """Return how many of a collector's datagrams are known to have reached nobody."""
        return self._lost.get((name, generation), 0)


def word_without_report(client: Client) -> Word | None:
    """Return the word of a client whose copies do not flow, whatever the services report."""
    if not client.streams:
        return "ok"
    return "withheld" if client.withheld else None
