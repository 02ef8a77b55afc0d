"""Tells the gateway of collectors that catch up, are level, or have left, and where they have got to; it keeps that."""

import time
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Final

import msgspec

from shared.bus.bodies.journal_messages import MAX_BEHIND, Behind, CatchUpReport, catch_up_topic
from shared.bus.continuity import Position, Worker
from shared.bus.zmq_sockets import Publisher
from shared.client import MAX_PLACES, Client, Place, Resume, Source
from shared.fanout.catch_up.journal_questions import Pursued
from shared.fanout.catch_up.window import Window

MAX_LEFT: Final = 1024
"""Collectors that have left, and that no other node serves, whose places are known; the first to leave go first."""


class Progress:
    """The reports of one sender of copies."""

    def __init__(self, publisher: Publisher, source: Source) -> None:
        self._publisher = publisher
        self._source = source
        self._topic = catch_up_topic(source)
        self._left: dict[str, tuple[int, int, tuple[Place, ...]]] = {}
        """Collectors that have left, each with the generation and all places that it had."""
        self._level: dict[str, int] = {}
        """Collectors that are level, with their generation, until the registry has nothing to resume for them."""

    def note_left(self, client: Client, since_ns: int, places: Sequence[Place]) -> None:
        """Tell that a collector has left: it has had what was received before `since_ns`, or is before its places."""
        self._left.pop(client.name, None)
        self._left[client.name] = client.generation, since_ns, tuple(places)
        self._publish([self._report_left(client.name)])

    def follow(self, elsewhere: Iterable[Client]) -> None:
        """Forget the first of those that have left, beyond a number: not those that another node serves now."""
        if len(self._left) > MAX_LEFT:
            names = {client.name for client in elsewhere}
            gone = [name for name in self._left if name not in names]
            for name in gone[: max(0, len(gone) - MAX_LEFT)]:
                del self._left[name]

    def resume(self, name: str, resume: Resume) -> Resume:
        """Return where a name goes on: where it was seen to leave, if under the generation that the registry means."""
        generation, since_ns, places = self._left.get(name, (0, 0, ()))
        if generation and generation == resume.generation:
            return msgspec.structs.replace(resume, since_ns=since_ns, places=places)
        return resume

    def _report_left(self, name: str) -> Behind:
        generation, since_ns, places = self._left[name]
        return Behind(name, generation, "left", max(1, since_ns), list(places[-MAX_PLACES:]))

    def note_level(self, name: str, generation: int) -> None:
        """Note that a collector is level: the next report says so."""
        self._level[name] = generation

    def forget_level(self, name: str) -> None:
        """Note that a collector is gone."""
        self._level.pop(name, None)

    def tell_again(self, fresh: Iterable[str]) -> None:
        """Tell a gateway that has just come which collectors have left, and where they have got to."""
        if any(self._topic.startswith(prefix) for prefix in fresh):
            self._publish([self._report_left(name) for name in self._left])

    def report(
        self,
        behind: Iterable[Sequence[Pursued]],
        positions: Callable[[str], Mapping[Worker, Position]],
        paces: Counter[str],
        resumes: Callable[[str], bool],
    ) -> None:
        """Tell which collectors are behind, or level again: for as long as the registry says that one resumes.

        `behind` has the pursuits of each collector. `positions` are those of a stream's workers, and `paces` the
        datagrams of the past that collectors got in the last second.
        """
        now_ns, told, positions = time.time_ns(), [], cache(positions)
        for pursued in behind:
            name, pursuits = pursued[0].name, [each.pursuit for each in pursued]
            places = sorted(
                (place for each in pursuits for place in each.places()), key=lambda place: place.received_ns
            )
            rows = sum(each.behind(positions(each.stream)) for each in pursuits)
            since_ns, oldest_ns = min(each.since_ns for each in pursuits), min(each.newest_ns for each in pursuits)
            numbers = rows, max(0, now_ns - oldest_ns) // 1_000_000, paces[name]
            told.append(Behind(name, pursued[0].generation, "catching_up", since_ns, places[-MAX_PLACES:], *numbers))
        self._publish([*told, *(Behind(name, each, "level", 0, []) for name, each in self._level.items())])
        self._level = {name: each for name, each in self._level.items() if resumes(name)}

    def _publish(self, told: Sequence[Behind]) -> None:
        for first in range(0, len(told) if self._publisher.wanted(self._topic) else 0, MAX_BEHIND):
            report = CatchUpReport(self._source, list(told[first : first + MAX_BEHIND]))
            self._publisher.publish(self._topic, report)


def with_successors(stream: str, places: Iterable[Place], living: Mapping[Worker, int]) -> Iterator[Place]:
    """Yield places in a stream, and the beginning of each living worker of which they have only earlier starts.

    All that it has published came behind these, whatever its clock said: `living` has the times of starts by it.
    """
    last: dict[str, Place] = {}
    known: set[Worker] = set()
    for place in places:
        if place.stream == stream:
            yield place
            known.add((place.worker, place.boot))
            last[place.worker] = max(place, last.get(place.worker, place), key=lambda each: each.received_ns)
    for worker in living.keys() - known:
        if before := last.get(worker[0]):
            yield Place(stream, *worker, 0, 0, min(living[worker], before.received_ns))


def possible_places(
    places: Iterable[Place],
    living: Container[Worker],
    window: Window,
    followed: Mapping[Worker, Position],
    *,
    sent: bool,
) -> Iterator[Place]:
    """Yield the places that another node has told of a stream without a journal, as far as anything is behind them.

    A start that has ended, and of which nothing is here, the last process has followed. If that has served the
    collector, it has `sent` what it had.
    """
    for place in places:
        worker = place.worker, place.boot
        if worker in living or window.find(worker, place.total):
            yield place
        elif position := followed.get(worker):
            had = position.reached - position.unserved if sent else 0
            yield msgspec.structs.replace(place, total=max(place.total, had))


def with_beginnings(
    stream: str, places: Iterable[Place], followed: Mapping[Worker, Position], let_go: Mapping[Worker, int]
) -> tuple[list[Place], int]:
    """Return the places of a collector in a stream, and how many datagrams it lacks.

    An ingest worker without a place gets one: where it began to come here. The uplink gets none: it brings streams of
    other sites, and nobody knows how much of what JetStream keeps is owed. All that was received since there is a ring
    is owed, so what the ring has `let_go` of that is lacked.
    """
    own = [place for place in places if place.stream == stream]
    known = {(place.worker, place.boot) for place in own}
    begun = {worker: each.baseline for worker, each in followed.items() if worker[0].startswith("ingest.")}
    own += [Place(stream, *worker, 0, total) for worker, total in begun.items() if worker not in known]
    lacked = [count for worker, count in let_go.items() if worker not in known and worker[0].startswith("uplink.")]
    return own, sum(lacked)


class LeftOff:
    """The places at which this node left off serving collectors, in streams without a journal.

    Of a collector that it has never served, those at which it heard of it.
    """

    def __init__(self) -> None:
        self._places: dict[str, tuple[int, Sequence[Place]]] = {}

    def note(self, client: Client, places: Sequence[Place]) -> None:
        """Note where a collector is left off."""
        self._places[client.name] = client.generation, places

    def follow(self, clients: Iterable[Client], places: Callable[[Client], Sequence[Place]]) -> None:
        """Keep what is noted of these collectors alone, and note the `places` of those that are new."""
        before, self._places = self._places, {}
        for client in clients:
            known = before.get(client.name)
            if known and known[0] == client.generation:
                self._places[client.name] = known
            else:
                self.note(client, places(client))

    def places(self, name: str, generation: int) -> Sequence[Place] | None:
        """Return those of a collector under a generation; None: there are none."""
        known = self._places.get(name)
        return known[1] if known and known[0] == generation else None
