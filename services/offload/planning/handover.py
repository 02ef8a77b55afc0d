"""The hand-over of a plan: told to the senders of copies, known to them, then made rules of. No I/O.

A sender that does not know a generation can't leave out whom it serves. So rules go in only once each sender that
subscribes has answered, and a generation is told for as long as datagrams with its mark may be on the way.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from services.offload.planning.planner import Planned
from shared.bus.bodies.offload_messages import KernelCopies, KernelServed
from shared.bus.bodies.packing import pack
from shared.bus.pieces import cut
from shared.client import Source

RETIRE_SECONDS: Final = 60.0
"""Time after its rules have gone that a generation is told: workers hold batches for 15 s at most, queues for less."""
TENTHS: Final = 10
"""Generations a second at most: the clock, by which a restart finds unused ones, counts faster than they do."""

Registry = tuple[int, int]
"""A gateway's boot id, and the revision of its registry."""


@dataclass(frozen=True, slots=True)
class Told:
    """A generation that senders are told of, and whom it serves."""

    generation: int
    serial: int
    served: tuple[KernelServed, ...]
    registry: Registry

    def messages(self, reply: str) -> Iterator[KernelCopies]:
        """Yield it in pieces."""
        pieces = cut(self.served, lambda each: len(pack(each)))
        for number, piece in enumerate(pieces):
            yield KernelCopies(self.generation, self.serial, reply, number, len(pieces), piece, *self.registry)


@dataclass(slots=True)
class Pending:
    """A plan that senders are told of, by IP version, and those whose answers have come, by serial."""

    planned: Planned
    told: Mapping[int, Told]
    since: float
    answered: dict[int, set[Source]] = field(default_factory=dict)

    @property
    def generations(self) -> dict[int, int]:
        """The generation of each IP version."""
        return {version: told.generation for version, told in self.told.items()}

    def known_to(self, senders: Collection[Source]) -> bool:
        """Return whether each of these senders knows all of it."""
        return all({*senders} <= self.answered.get(told.serial, set()) for told in self.told.values())


class Handover:
    """Numbers generations, and keeps those that senders have to know; `fresh` are those to be told now.

    `clock` is the time since the host was started, in seconds.
    """

    def __init__(self, generations: int, clock: Callable[[], float]) -> None:
        self.live: Pending | None = None
        """The plan whose rules are in the kernel."""
        self.pending: Pending | None = None
        self.fresh: list[Told] = []
        self._most = generations
        self._clock = clock
        self._generation = int(clock() * TENTHS)
        self._serial = 0
        self._retiring: list[tuple[float, Told]] = []

    def begin(self, planned: Planned, registry: Registry) -> None:
        """Tell senders of a plan, which takes a new generation for each IP version; one that is pending is given up."""
        if self.pending:
            self._retire(self.pending)
        told = {}
        for version in planned.versions:
            served = tuple(KernelServed(each.client, each.streams, each.copy.share) for each in planned.served[version])
            told[version] = Told(self._next_generation(), self._next_serial(), served, registry)
        self.pending = Pending(planned, told, self._clock())
        self.fresh += told.values()

    def note_reply(self, source: Source, serial: int) -> None:
        """Note that a sender knows the generation of a serial number."""
        if self.pending:
            self.pending.answered.setdefault(serial, set()).add(source)

    def complete(self) -> None:
        """Note that the pending plan's rules are in the kernel, in the place of those before."""
        if self.live:
            self._retire(self.live)
        self.live, self.pending = self.pending, None

    def give_up(self) -> bool:
        """Note that the pending plan's rules are not in the kernel, but those before; return whether they may stay.

        They may as long as they serve nobody otherwise than the pending plan: who has left would go on getting copies.
        """
        given_up, self.pending = self.pending, None
        if given_up:
            self._retire(given_up)
        if not (self.live and given_up):
            return True
        wanted = {each.client.name: each for some in given_up.planned.served.values() for each in some}
        return all(wanted.get(each.client.name) == each for some in self.live.planned.served.values() for each in some)

    def forget_live(self) -> None:
        """Note that no rules are in the kernel any more."""
        if self.live:
            self._retire(self.live)
        self.live = None

    def told(self) -> list[Told]:
        """Return every generation that a new sender has to know."""
        current = [told for plan in (self.live, self.pending) if plan for told in plan.told.values()]
        return [*(told for _, told in self._retiring), *current]

    def expire(self) -> None:
        """Tell senders to forget the generations of which nothing can be on the way any more."""
        now = self._clock()
        for due_at, told in self._retiring:
            if due_at <= now:
                self.fresh.append(Told(told.generation, self._next_serial(), (), (0, 0)))
        self._retiring = [each for each in self._retiring if each[0] > now]

    def _retire(self, plan: Pending) -> None:
        self._retiring += [(self._clock() + RETIRE_SECONDS, told) for told in plan.told.values()]

    def _next_generation(self) -> int:
        """Return a number that none has that is still told, if there is one: it would be forgotten with that."""
        used = {each.generation for each in self.told()}
        after = [self._generation + step for step in range(1, self._most + 1)]
        self._generation = next((each for each in after if 1 + each % self._most not in used), after[0])
        return 1 + self._generation % self._most

    def _next_serial(self) -> int:
        self._serial = max(self._serial + 1, int(self._clock() * 1000))
        return self._serial
