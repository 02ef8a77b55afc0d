"""The places that collectors have reached in their streams, by name: those that have left, and those that catch up.

They outlast the entry, for a name that comes back and asks for what it has missed. The earlier holder's are never
another's. No I/O; the store is handed in.
"""

import math
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import msgspec

from services.gateway.registry.entry import Entry
from shared.bus.bodies.journal_messages import Behind
from shared.client import ALL_STREAMS, MAX_PLACES, Generation, Places, Resume, Streams

STORE_SECONDS: Final = 5.0
"""Time by which the place that is kept of a collector that catches up may be old; its sender keeps a newer one."""
TOLD_SECONDS: Final = 10.0
"""Time for which a report of one counts. Its sender tells each second, and once that it is level, which may be lost."""


class Past(msgspec.Struct, frozen=True, omit_defaults=True):
    """The place that a name has reached under a generation, in these streams.

    Of a worker in `places` it has had all before its place; of any other all that was received before `since_ns`.
    """

    holder: str
    generation: Generation
    since_ns: Generation
    streams: Streams
    places: Places = ()


PastByName = Mapping[str, Past | None]
"""Places that names have reached; None: nothing is known of one any more."""
NO_PASTS: Final[PastByName] = MappingProxyType({})
Keep = Callable[[PastByName], None]
"""Stores what is known of these names now. OSError when it can't."""


class Progress(msgspec.Struct, frozen=True):
    """A collector's way back, as JSON has it: datagrams and seconds behind, its pace, and seconds until it is level.

    `level_in` is None while that can't be told: it gets no more than comes anew, or nothing at all.
    """

    rows: int
    seconds: float
    per_second: int
    level_in: float | None


@dataclass(slots=True)
class _Told:
    """The last report of a collector that catches up, and the time at which a place of it was stored last."""

    generation: int
    rows: int
    at: float
    kept_at: float
    progress: Progress | None = None


class Pasts:
    """Places by name: at most `most` of them, and `most_of_holder` of one holder.

    Their times are of `unix_time`, as those in a journal; how old they are here goes by `clock`, which is not set.
    """

    def __init__(
        self,
        unix_time: Callable[[], float],
        clock: Callable[[], float],
        keep: Keep = lambda _changed: None,
        most: int = 10_000,
        most_of_holder: int = 10_000,
    ) -> None:
        self.journaled: frozenset[str] = frozenset()
        """The streams that have a journal."""
        self.unix_time = unix_time
        self._clock = clock
        self._keep = keep
        self._most = most
        self._most_of_holder = most_of_holder
        self._pasts: dict[str, Past] = {}
        self._told: dict[str, _Told] = {}

    def restore(self, pasts: Mapping[str, Past]) -> None:
        """Go on with what an earlier start has kept."""
        self._pasts = dict(pasts)

    def left(self, name: str, streams: Collection[str], holder: str, present: Entry | None) -> Resume | None:
        """Return where a name has left these streams, under this holder; None: that is not known.

        `present` is the entry of that name, if there is one: it is to be replaced.
        """
        past = self._pasts.get(name) if present is None else self.left_by(present)
        if past is None or past.holder != holder:
            return None
        had = self.journaled_of(past.streams)
        both = tuple(stream for stream in self.journaled_of(streams) if stream in had)
        named = () if ALL_STREAMS in past.streams and ALL_STREAMS in streams else both
        return Resume(past.since_ns, past.generation, past.places, named) if both else None

    def progress(self, entry: Entry) -> Progress | None:
        """Return how far an entry is behind, while it catches up."""
        told = self._told.get(entry.client.name)
        if told and told.generation == entry.client.generation and self._clock() < told.at + TOLD_SECONDS:
            return told.progress
        return Progress(0, 0.0, 0, None) if entry.client.resume else None

    def journaled_of(self, streams: Collection[str]) -> tuple[str, ...]:
        """Return those of some streams that have a journal: of all streams more than an entry may name."""
        return tuple(sorted(self.journaled if ALL_STREAMS in streams else self.journaled.intersection(streams)))

    def left_by(self, entry: Entry) -> Past | None:
        """Return the place that is to be kept of an entry that goes, or is replaced by another; None: of none."""
        client = entry.client
        if not self.journaled_of(client.streams):
            return None
        known = self._pasts.get(client.name)
        places = known.places if known and known.generation == client.generation else ()
        past = Past(entry.peer.rights.holder, client.generation, self._now_ns(), client.streams, places)
        if client.resume and not places:  # it had not begun to catch up
            past = msgspec.structs.replace(past, since_ns=client.resume.since_ns, places=client.resume.places)
        return past

    def note(self, changed: PastByName) -> None:
        """Note what is known of these names now, which is stored already; None: nothing."""
        for name, past in changed.items():
            self._pasts.pop(name, None)
            if past is not None:
                self._pasts[name] = past

    def note_behind(self, told: Behind, present: Entry | None) -> None:
        """Note the report of a collector that catches up, or has left; `present` is the entry of its name."""
        known, places = self._pasts.get(told.name), tuple(told.places[-MAX_PLACES:])
        with suppress(OSError):  # the store has logged it; its sender knows the place, and tells again
            if told.state == "left":
                if known and known.generation == told.generation:
                    past = msgspec.structs.replace(known, since_ns=told.since_ns, places=places)
                    self._put({told.name: past})
            elif present is not None and present.client.generation == told.generation:
                if told.state == "level":
                    self.forget_progress(told.name)
                    if known and known.generation == told.generation:  # it gets far beyond that place now
                        self._put({told.name: None})
                else:
                    self._note_progress(told, present, places)

    def forget_progress(self, name: str) -> None:
        """Note that a name is level, or has gone."""
        self._told.pop(name, None)

    def _note_progress(self, told: Behind, entry: Entry, places: Places) -> None:
        now, before = self._clock(), self._told.get(told.name)
        if before is None or before.generation != told.generation:
            before = _Told(told.generation, told.rows, now, -math.inf)
        gains = (before.rows - told.rows) / (now - before.at) if now > before.at else 0.0
        level_in = round(told.rows / gains, 1) if gains > 0 else (0.0 if not told.rows else None)
        progress = Progress(told.rows, told.age_ms / 1000, told.per_second, level_in)
        self._told[told.name] = last = _Told(told.generation, told.rows, now, before.kept_at, progress)
        if now >= before.kept_at + STORE_SECONDS:
            holder, streams = entry.peer.rights.holder, entry.client.streams
            self._put({told.name: Past(holder, told.generation, told.since_ns, streams, places)})
            last.kept_at = now

    def resumed(self, entry: Entry) -> Resume | None:
        """Return where an entry that an earlier start has left catching up goes on, as far as its sender told."""
        resume, past = entry.client.resume, self._pasts.get(entry.client.name)
        if resume is None or past is None or past.generation != entry.client.generation:
            return resume
        return msgspec.structs.replace(resume, since_ns=past.since_ns, places=past.places)

    def prune(self) -> None:
        """Forget the oldest places of each holder that has too many; where all are too many, of those with most."""
        if len(self._pasts) <= min(self._most, self._most_of_holder):
            return
        of_holder: dict[str, list[str]] = {}
        for name, past in self._pasts.items():
            of_holder.setdefault(past.holder, []).append(name)
        left, gone = self._most, list[str]()
        for number, (holder, names) in enumerate(sorted(of_holder.items(), key=lambda each: len(each[1]))):
            most = left // (len(of_holder) - number)  # an equal part of what those with fewer have left
            if holder:
                most = min(most, self._most_of_holder)
            gone += names[: max(0, len(names) - most)]
            left -= min(len(names), most)
        if gone:
            self._put(dict.fromkeys(gone))

    def _put(self, changed: PastByName) -> None:
        self._keep(changed)
        self.note(changed)

    def _now_ns(self) -> int:
        return int(self.unix_time() * 1e9)
