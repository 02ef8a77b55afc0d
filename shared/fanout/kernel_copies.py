"""Copies that the kernel has made already: of which rows of a batch, and for which collectors. No I/O.

Rules in the kernel follow the registry a moment later, so an entry of a generation may differ from today's. For a row
with that generation's mark the entry of the rules says what was copied, and today's entry what is wanted. The collector
gets from us what it wants and the kernel has not copied.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, NamedTuple

import msgspec
import numpy as np

from shared.bus.bodies.offload_messages import KernelCopies, KernelServed
from shared.bus.messages import Envelope
from shared.bus.pieces import Assembler
from shared.client import Client, Source
from shared.datagrams.batch import DatagramBatch, Generations, Indices
from shared.datagrams.gathered import Gathered, Mask
from shared.datagrams.routing import Router, Selection
from shared.datagrams.sampling import find_buckets, find_share

MAX_ENTRIES: Final = 500_000
"""Of all generations together, some 100 bytes each; beyond it the generation that was used longest ago is forgotten."""

NOTHING_LEFT_OUT: Final = Selection(None)
NOBODY: Final = -1
Entries = dict[str, Client]
"""Entries of rules, by name."""


@dataclass(slots=True)
class _Rules:
    """The rules of one generation, by stream, as the offload service with boot id `boot` has numbered them.

    `matched` has, by stream and name, the rows that an entry with sampling has matched.
    """

    boot: int
    serial: int
    streams: dict[str, Entries]
    shares: dict[str, bytes]
    """By name, of members of groups."""
    matched: Counter[tuple[str, str]] = field(default_factory=Counter)

    @property
    def size(self) -> int:
        """The number of entries."""
        return sum(map(len, self.streams.values()))


@dataclass(slots=True)
class _Standing:
    """The entries of a generation for a stream, compared with those of today.

    `same` have today's entry, `changed` another one.
    """

    stream: str
    same: Entries
    changed: Entries
    router: Router
    shares: Mapping[str, bytes]
    matched: Counter[tuple[str, str]]

    def copies(self, entry: Client, rows: int) -> int:
        """Return how many copies the kernel makes of rows that an entry matches: the first, and each n-th after it."""
        if entry.sample == 1:
            return rows
        before = self.matched[self.stream, entry.name]
        self.matched[self.stream, entry.name] += rows
        return -(-(before + rows) // entry.sample) - -(-before // entry.sample)


class _Planned(NamedTuple):
    """The rows that an entry of the rules has matched, their number, and the number of copies made of them."""

    rows: Mask
    rows_matched: int
    made: int


class KernelRules:
    """The generations of rules that the kernel has copied by, or may have."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._rules: OrderedDict[int, _Rules] = OrderedDict()
        """By generation; the one that was used last is the last."""
        self._entries = 0
        self._today: Mapping[str, Client] = {}
        self._standings: dict[tuple[int, str], _Standing] = {}
        self._assembler = Assembler[KernelCopies]()
        self._given_up: set[int] = set()
        """Generations that nobody has told of in time."""
        self._latest: dict[str, int] = {}
        """By stream: the generation of the last row that had one, 0 once a batch has none."""

    def note(self, envelope: Envelope, body: KernelCopies) -> bool:
        """Take in a piece of a generation; return whether all of it is known now."""
        pieces = self._assembler.add((envelope.boot, body.generation, body.serial), body)
        if pieces is None:
            return False
        known = self._rules.get(body.generation)
        if known and known.boot == envelope.boot and known.serial >= body.serial:
            return True
        self._forget(body.generation)
        streams: dict[str, Entries] = {}
        all_served = [served for piece in pieces for served in piece.served]
        for served in all_served:
            self._enter(served, streams)
        shares = {served.client.name: served.share for served in all_served if served.share}
        rules = self._rules[body.generation] = _Rules(envelope.boot, body.serial, streams, shares)
        self._given_up.discard(body.generation)
        self._entries += rules.size
        while self._entries > MAX_ENTRIES and len(self._rules) > 1:
            self._forget(next(iter(self._rules)))
        return True

    def _enter(self, served: KernelServed, streams: dict[str, Entries]) -> None:
        today = self._today.get(served.client.name)
        client = today if today == served.client else served.client  # generations differ little: most share an entry
        for stream in served.streams:
            streams.setdefault(stream, {})[client.name] = client

    def _forget(self, generation: int) -> None:
        if rules := self._rules.pop(generation, None):
            self._entries -= rules.size
            self._standings = {key: each for key, each in self._standings.items() if key[0] != generation}

    def follow(self, clients: Iterable[Client]) -> None:
        """Compare with these collectors from now on."""
        self._today = {client.name: client for client in clients}
        self._standings.clear()

    def know(self, generations: Generations) -> bool:
        """Return whether the rules of each row are known, or given up."""
        return all(each in self._rules or each in self._given_up for each in _distinct(generations))

    def serve(self, client: Client, stream: str) -> bool:
        """Return whether a collector was served by the rules that have copied of the last batch of a stream.

        Before the first copy it is enough that any rules serve it, such as those told to a process that has just begun.
        """
        latest = [self._latest[stream]] if stream in self._latest else list(self._rules)
        return any(each in self._rules and client.name in self._standing(each, stream).same for each in latest)

    def give_up(self, generations: Generations) -> list[int]:
        """Wait no longer to be told of these; return those that nobody has told of."""
        unknown = [each for each in _distinct(generations) if each not in self._rules]
        self._given_up.update(unknown)
        return unknown

    def entries_for(self, client: Client, batch: DatagramBatch) -> dict[int, KernelServed | None]:
        """Return, by generation of a batch, the entry by which rules copy to a collector's address and port.

        A generation that nobody has told of has None, one that does not copy to it is left out.
        """
        found: dict[int, KernelServed | None] = {}
        for generation in _distinct(batch.generations) if batch.generations is not None else ():
            rules = self._rules.get(generation)
            entry = rules.streams.get(batch.stream, {}).get(client.name) if rules else None
            if rules is None:
                found[generation] = None
            elif entry and entry.socket_address == client.socket_address:
                found[generation] = KernelServed(entry, (batch.stream,), rules.shares.get(entry.name, b""))
        return found

    def __bool__(self) -> bool:
        """Return whether any rules are known, so that the kernel may copy."""
        return bool(self._rules)

    def copied(self, batch: Gathered) -> "CopiedRows | None":
        """Return which rows the kernel has copied; None where it has copied none."""
        generations = batch.generations
        if generations is None or not (distinct := _distinct(generations)):
            if self._latest:
                self._latest[batch.stream] = 0
            return None
        standings = {}
        self._latest[batch.stream] = int(generations[np.flatnonzero(generations)[-1]])
        for generation in distinct:
            if generation in self._rules:
                self._rules.move_to_end(generation)
                standings[generation] = self._standing(generation, batch.stream)
        return CopiedRows(batch, distinct, standings, self._source)

    def _standing(self, generation: int, stream: str) -> _Standing:
        found = self._standings.get((generation, stream))
        if found is None:
            found = self._standings[generation, stream] = self._compare(self._rules[generation], stream)
        return found

    def _compare(self, rules: _Rules, stream: str) -> _Standing:
        entries = rules.streams.get(stream, {})
        same, changed, router = {}, {}, Router()
        for name, entry in entries.items():
            today = self._today.get(name)
            if today and today.generation == entry.generation and today.wants(stream):
                same[name] = entry
            elif entry.source == self._source or (today and today.socket_address == entry.socket_address):
                changed[name] = entry
        router.replace(msgspec.structs.replace(entry, sample=1, group="") for entry in changed.values())
        return _Standing(stream, same, changed, router, rules.shares, rules.matched)


class CopiedRows:
    """The rows of one batch that the kernel has copied, or may have.

    `late` counts copies by entries that are not today's, as far as today's entry does not want them.
    """

    def __init__(
        self, batch: Gathered, generations: list[int], standings: dict[int, _Standing], source: Source
    ) -> None:
        column = batch.generations
        assert column is not None
        self._masks: dict[int, Mask] = {each: column == each for each in generations}
        self._standings = standings
        unknown = [mask for each, mask in self._masks.items() if each not in standings]
        self._source = source
        self._buckets = find_buckets(batch) if any(each.shares for each in standings.values()) else None
        self._unknown = np.logical_or.reduce(unknown) if unknown else None
        self._all = np.ones(len(batch), np.bool_)
        self._divided: dict[tuple[int, tuple[int, ...]], tuple[Selection, Selection]] = {}
        """By the id of a selection and the generations that serve the collector: the selection, and the rest of it."""
        self._changed: dict[tuple[int, str], _Planned] = {}
        self.late = 0
        for generation, standing in standings.items():
            for client, selection in standing.router.route(batch) if standing.changed else ():
                rows = self._reached(generation, client.name)
                if selection.indices is not None:
                    rows = rows & _mask(selection.indices, len(batch))
                entry, count = standing.changed[client.name], int(np.count_nonzero(rows))
                made = standing.copies(entry, count)
                self._changed[generation, client.name] = _Planned(rows, count, made)
                if entry.source == source:
                    self.late += made

    def _reached(self, generation: int, name: str) -> Mask:
        """Return the rows of a generation that have come to a collector's copies, as far as its prefixes let them."""
        share = self._standings[generation].shares.get(name)
        if share is None or self._buckets is None:
            return self._masks[generation]
        return self._masks[generation] & find_share(share, self._buckets)

    def give_back(self, members: Sequence[Client], wanted: Mapping[str, Mask], taken: dict[str, Mask]) -> None:
        """Give each row of a group to the member that has a copy of it already, if there is one that still wants it.

        It may be another one than today's choice, where the group was another one when the rules were made. If several
        have one, it is the one whose entry is today's: copies by other entries are counted as late.
        """
        holders = np.full(len(self._all), NOBODY)
        for generation, standing in self._standings.items():
            for number, client in sorted(enumerate(members), key=lambda each: each[1].name in standing.same):
                planned = self._changed.get((generation, client.name))
                if client.name in standing.same:
                    holders[wanted[client.name] & self._reached(generation, client.name)] = number
                elif planned is not None and client.socket_address == standing.changed[client.name].socket_address:
                    holders[wanted[client.name] & planned.rows] = number
        held = holders != NOBODY
        for number, client in enumerate(members) if held.any() else ():
            taken[client.name] = np.where(held, holders == number, taken[client.name])

    def leave_out(self, client: Client, rows: Mask) -> tuple[Mask, Selection]:
        """Return which of the rows that a collector wants are left to us, and what became of the others."""
        by_kernel = passed_over = unplanned = 0
        for generation, standing in self._standings.items():
            entry, planned = standing.same.get(client.name), self._changed.get((generation, client.name))
            if entry is not None:
                hit = rows & self._reached(generation, client.name)
                count = int(np.count_nonzero(hit))
                made = standing.copies(entry, count)
            elif planned is not None and client.socket_address == standing.changed[client.name].socket_address:
                hit = rows & planned.rows
                count = int(np.count_nonzero(hit))
                made = planned.made * count // planned.rows_matched if count else 0
                self.late -= made * (standing.changed[client.name].source == self._source)
            else:
                continue
            by_kernel, passed_over, rows = by_kernel + made, passed_over + count - made, rows & ~hit
        if self._unknown is not None:
            unplanned = int(np.count_nonzero(rows & self._unknown))
            rows = rows & ~self._unknown
        return rows, Selection(None, sampled_out=passed_over, by_kernel=by_kernel, unplanned=unplanned)

    def divide(self, client: Client, selection: Selection) -> Selection:
        """Return what is left to us of the rows selected for a collector; its sample was taken of what is left."""
        if client.sample > 1:
            return selection
        serving = tuple([each for each, standing in self._standings.items() if client.name in standing.same])
        changed = bool(self._changed) and any((each, client.name) in self._changed for each in self._standings)
        if not (serving or changed or self._unknown is not None):
            return selection
        key = id(selection), serving
        if not changed and key in self._divided:
            return self._divided[key][1]
        wanted = self._all if selection.indices is None else _mask(selection.indices, len(self._all))
        rest, left = self.leave_out(client, wanted)
        divided = selection
        if left != NOTHING_LEFT_OUT:
            divided = replace(left, indices=np.flatnonzero(rest))
            divided = replace(divided, filtered=selection.filtered, shared_out=selection.shared_out)
        if not changed:
            self._divided[key] = selection, divided
        return divided


def _mask(rows: Indices, count: int) -> Mask:
    found = np.zeros(count, np.bool_)
    found[rows] = True
    return found


def _distinct(generations: Generations) -> list[int]:
    first = int(generations[0]) if len(generations) else 0
    if (generations == first).all():
        return [first] if first else []
    return [each for each in np.unique(generations).tolist() if each]
