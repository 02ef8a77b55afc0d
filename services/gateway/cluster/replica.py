"""The registry of this gateway, as a replica of the log: applies each record in order, its own ones too. No I/O.

A change that is proposed keeps its own entry, which knows the client's connection, until its records come back.
"""

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from typing import Final, Protocol

import msgspec

from services.gateway.cluster import keys
from services.gateway.cluster.records import (
    AWAY,
    Entered,
    Gone,
    Identity,
    LaterError,
    Left,
    ListIdentity,
    Ordered,
    Record,
    Session,
    decode,
    entry_of,
    record_of,
    seconds_of,
)
from services.gateway.cluster.sessions import Sessions
from services.gateway.fault_guard import surviving
from services.gateway.registry.changes import Change
from services.gateway.registry.entry import NO_ORDERS, Entry, Event, EventKind, Orders
from services.gateway.registry.reached_places import NO_PASTS, PastByName
from services.gateway.registry.registry import RETURN_SECONDS, Registry
from shared.log import get_logger

PROPOSALS_MAX: Final = 4096
"""Proposals remembered whose outcome is not known; the oldest are no longer in anybody's hands."""
KEPT_TOGETHER: Final = 512

log = get_logger()


class Cache(Protocol):
    """The file in which this node keeps the list, for a start without the cluster."""

    def keep(self, events: Sequence[Event], generation: int, withheld: Orders, pasts: PastByName) -> None:
        """Keep changes."""

    def keep_identity(self, epoch: str, group_secret: bytes) -> None:
        """Keep the list's identity."""


@dataclass(slots=True)
class Proposal:
    """Changes that were written, or may be: by part, and the parts that have not come back yet."""

    parts: list[Change]
    missing: set[int]
    landed: Callable[[], None]


@dataclass(slots=True)
class _Seen:
    """The names met while the whole log is read."""

    restoring: bool
    """The entries that this gateway has and the log has not are to be written anew: the log has begun anew."""
    clients: set[str] = field(default_factory=set)
    orders: set[str] = field(default_factory=set)


class Replica:
    """Applies the log to a registry, from its first record or from where it was; `position` is that of the last one."""

    def __init__(
        self,
        registry: Registry,
        sessions: Sessions,
        cache: Cache,
        clock: Callable[[], float],
        changed: Callable[[], None],
    ) -> None:
        self.registry = registry
        self.sessions = sessions
        self.position = 0
        self.list_position = 0
        """The position of the last record of the list."""
        self.list_ends_at = inf
        """The Unix time from which on the server may have dropped that record, as it is the mark of an end."""
        self.damaged = 0
        self.epoch = ""
        self.identity_due: int | None = None
        """The position of what stands in place of the list's identity, 0: nothing; None: the identity is there."""
        self.overwritten: Callable[[], None] = lambda: None
        """Called when another value has come in place of one that this node knows: `restore` is due."""
        self.lost: Callable[[Entry, Entry | None], None] = lambda _entry, _successor: None
        """Called with an entry of a connection here that another node has replaced, or has let expire."""
        self._cache = cache
        self._clock = clock
        self._changed = changed
        self._numbers = 0
        self._proposals: dict[int, Proposal] = {}
        self._seen: _Seen | None = None
        self._unlisted: set[str] = set()
        self._unlisted_orders: set[str] = set()
        self._later = False
        """A later release writes records that this one may not be able to read: none is damaged for certain."""
        self._uncached: list[Change] = []
        registry.leases.measures = sessions.measures

    @property
    def identity(self) -> tuple[str, int]:
        """The node and the boot that this gateway's records carry."""
        return self.sessions.own, self.sessions.boot

    def propose(self, changes: Sequence[Change], landed: Callable[[], None]) -> list[Record]:
        """Return the records of changes that are to be written together; `landed` is called once all have come back."""
        self._numbers += 1
        parts = [part for change in changes for part in _parts(change)]
        records: list[Record] = []
        for number, part in enumerate(parts):
            records.append(self._record(part, Identity(*self.identity, self._numbers, number)))
        self._proposals[self._numbers] = Proposal(parts, set(range(len(parts))), landed)
        if len(self._proposals) > PROPOSALS_MAX:
            del self._proposals[next(iter(self._proposals))]
        pasts = {name: past for change in changes for name, past in change.pasts.items()}
        return [*records, *(Left(name=name, past=past) for name, past in pasts.items())]

    def _record(self, part: Change, by: Identity) -> Record:
        if part.orders:
            ((name, order),) = part.orders.items()
            revision = part.events[-1].revision if part.events else self.registry.revision
            return Ordered(by=by, revision=revision, name=name, order=order)
        (event,) = part.events
        client = event.entry.client
        if event.kind in ("left", "expired"):
            expired = event.kind == "expired"
            return Gone(by=by, revision=event.revision, name=client.name, generation=client.generation, expired=expired)
        return record_of(event.entry, by, event.revision)

    def begin(self, *, anew: bool, restoring: bool = False) -> None:
        """Expect the records behind `position`; `anew`: the whole log, from its first record on.

        What is not among these has gone then; `restoring`: it is in `unlisted` instead.
        """
        if anew:
            self.position = self.list_position = self.identity_due = 0
            self._seen = _Seen(restoring)
            self.sessions.known.clear()

    def receive(self, position: int, key: str, data: bytes, stored_at: float) -> None:
        """Apply the record at a position; one that can't be read is counted, and what was there is written again."""
        self.position = position
        if key.startswith(keys.LISTED.removesuffix(">")):
            self.list_position, self.list_ends_at = position, inf
        try:
            record = decode(key, data, stored_at)
        except ValueError as error:
            self.damaged += 1
            self._later |= isinstance(error, LaterError)
            self._set_aside(key, position)
            log.warning("a record of the cluster's registry can't be read: it is set aside", key=key, reason=str(error))
        else:
            if self.list_position == position and (seconds := seconds_of(record)):
                self.list_ends_at = stored_at + seconds / 2
            applied = False  # a fault of ours costs this record alone, or it would end each gateway at each start
            with surviving("error while a record of the cluster's registry was applied", key=key):
                self._apply(record, position)
                applied = True
            self.damaged += not applied
        self._changed()

    def _set_aside(self, key: str, position: int) -> None:
        """Keep what is known under a key whose value is another one now, and have it written there again.

        Values from before this node began to read may be old here: nodes that know them write them.
        """
        if key.startswith(keys.SESSION):
            self.sessions.move(key.removeprefix(keys.SESSION), position)
        elif self._later:
            self.identity_due = None
        elif key == keys.META:
            self.identity_due = position
        elif self._seen is None:
            name, is_order = keys.name_in(key), key.startswith(keys.WITHHELD)
            if name in self.registry.withheld if is_order else self.registry.find(name):
                (self._unlisted_orders if is_order else self._unlisted).add(name)
                self.overwritten()

    def _apply(self, record: Record, position: int) -> None:
        match record:
            case Entered() | Gone() | Ordered():
                self._apply_listed(record)
            case Left():
                change = Change((), NO_ORDERS, {record.name: record.past}, 0)
                self._make(change)
            case Session():
                self._note_last(record.revision, record.generation)
                if self.sessions.note(record, position, self._clock()):
                    self.measure_anew()
            case ListIdentity():
                self._identify(record)

    def _apply_listed(self, record: Entered | Gone | Ordered) -> None:
        name = record.client.name if isinstance(record, Entered) else record.name
        if self._seen is not None:
            (self._seen.orders if isinstance(record, Ordered) else self._seen.clients).add(name)
        (self._unlisted_orders if isinstance(record, Ordered) else self._unlisted).discard(name)
        proposal = self._proposals.get(record.by.change) if self.identity == (record.by.node, record.by.boot) else None
        if proposal is None or record.by.part not in proposal.missing:
            self._apply_foreign(record)
            return
        proposal.missing.discard(record.by.part)
        self._make(self._as_it_is_now(proposal.parts[record.by.part]))
        if not proposal.missing:
            del self._proposals[record.by.change]
            proposal.landed()

    def _as_it_is_now(self, part: Change) -> Change:
        """Return a part of a change; where it only moves an entry, that is the entry as it is now."""
        if not part.events or part.events[0].kind != "renewed":
            return part
        (event,) = part.events
        present = self.registry.find(event.entry.client.name)
        assert present is not None  # or the record would have been refused
        return Change([replace(event, entry=replace(present, home=event.entry.home))], NO_ORDERS, NO_PASTS, 0)

    def _apply_foreign(self, record: Entered | Gone | Ordered) -> None:
        """Apply a change of another node, or of an earlier start."""
        registry = self.registry
        revision = max(registry.revision, record.revision)
        match record:
            case Entered():
                self._enter(record, revision)
            case Gone():
                present = registry.find(record.name)
                if present is not None:
                    kind: EventKind = "expired" if record.expired else "left"
                    self._make(Change([Event(kind, revision, present)], NO_ORDERS, NO_PASTS, record.generation))
                    if record.expired and present.peer.id > 0:
                        self.lost(present, None)
                self._note_last(revision, record.generation)
            case Ordered():
                self._make(self._ordered(record, revision))
        self._note_last(revision)

    def _note_last(self, revision: int, generation: int = 0) -> None:
        """Note numbers that were given, though their record may have been replaced before it came here."""
        self.registry.apply(Change((), NO_ORDERS, NO_PASTS, generation))
        self.registry.revision = max(self.registry.revision, revision)

    def _ordered(self, record: Ordered, revision: int) -> Change:
        present, orders = self.registry.find(record.name), {record.name: record.order}
        events = []
        if present is not None and present.client.withheld != record.order:
            client = msgspec.structs.replace(present.client, withheld=record.order)
            events = [Event("changed", revision, replace(present, client=client, revision=revision))]
        return Change(events, orders, NO_PASTS, 0)

    def _enter(self, record: Entered, revision: int) -> None:
        order = self.registry.withheld.get(record.client.name)
        client = msgspec.structs.replace(record.client, withheld=order)
        present = self.registry.find(client.name)
        generation = record.client.generation
        entry = entry_of(record, self._clock())
        entry.client = client
        if present is not None and present.client.generation == generation and present.peer.id > 0:
            entry.peer = present.peer
        self._disown(entry)
        if present is not None and present.client == client and present.host == record.host:
            self._make(Change([Event("renewed", self.registry.revision, entry)], NO_ORDERS, NO_PASTS, generation))
            return
        kind: EventKind = "joined" if present is None else "changed"
        self._make(Change([Event(kind, revision, entry)], NO_ORDERS, NO_PASTS, generation))
        if present is not None and present.peer.id > 0 and present.client.generation != generation:
            self.lost(present, entry)

    def _disown(self, entry: Entry) -> bool:
        """Note that no connection holds an entry any more, if its gateway has ended; return whether that is new."""
        reading = self._seen is not None  # sessions stand behind the entries
        if reading or not entry.held or entry.peer.id != AWAY or self.sessions.is_live(entry.node, entry.boot):
            return False
        entry.peer = replace(entry.peer, id=0)
        entry.ttl = entry.ttl or RETURN_SECONDS
        return True

    def measure_anew(self) -> None:
        """Begin the leases that are measured here from now on, and end the others: a session has begun or ended."""
        registry = self.registry
        for entry in list(registry.entries()):
            was_measured, held = entry.expires_at < float("inf"), replace(entry)
            if self._disown(held):
                self._make(Change([Event("renewed", registry.revision, held)], NO_ORDERS, NO_PASTS, 0))
            elif self.sessions.measures(entry) != was_measured:
                registry.leases.begin(entry)

    def _identify(self, record: ListIdentity) -> None:
        self.epoch, self.identity_due = record.epoch, None
        self._cache.keep_identity(record.epoch, record.group_secret)
        registry = self.registry
        if registry.groups.secret != record.group_secret:
            registry.groups.change_secret(record.group_secret, registry.entries())
            grouped = [replace(entry) for entry in registry.entries() if entry.client.group]
            events = [Event("changed", registry.revision, entry) for entry in grouped]
            registry.apply(Change(events, NO_ORDERS, NO_PASTS, 0))

    def caught_up(self) -> None:
        """Note that all records that there were have come: what was not among them has gone."""
        seen, self._seen = self._seen, None
        registry = self.registry
        if seen is not None and seen.restoring:
            self._unlisted = {entry.client.name for entry in registry.entries()} - seen.clients
            self._unlisted_orders = {*registry.withheld} - seen.orders
        elif seen is not None:
            for entry in [each for each in registry.entries() if each.client.name not in seen.clients]:
                self._make(Change([Event("left", registry.revision, entry)], NO_ORDERS, NO_PASTS, 0))
                if entry.peer.id > 0:
                    self.lost(entry, None)
            for name in [name for name in registry.withheld if name not in seen.orders]:
                by = Identity(*self.identity, 0)
                self._make(self._ordered(Ordered(by=by, revision=0, name=name), registry.revision))
            self._changed()
        self.measure_anew()
        self._flush_cache()

    def choose_key(self) -> str:
        """Return the key of an entry or an order that the log should have, chosen by chance; empty: there is none."""
        names = {entry.client.name for entry in self.registry.entries()} - self._unlisted
        orders = {*self.registry.withheld} - self._unlisted_orders
        known = [*((keys.CLIENT, name) for name in names), *((keys.WITHHELD, name) for name in orders)]
        if not known:
            return ""
        prefix, name = random.choice(known)
        return prefix + keys.unparse_name(name)

    def restore(self) -> None:
        """Write what this node knows and the log lacks, or has lost; to be planned."""
        registry = self.registry
        for name in self._unlisted_orders & {*registry.withheld}:
            registry.order(name, registry.withheld[name])
        registry.narrow(
            [(entry, entry.client.streams) for entry in registry.entries() if entry.client.name in self._unlisted]
        )

    def _make(self, change: Change) -> None:
        self.registry.apply(change)
        self._uncached.append(change)
        if self._seen is None or len(self._uncached) >= KEPT_TOGETHER:
            self._flush_cache()

    def _flush_cache(self) -> None:
        waiting, self._uncached = self._uncached, []
        if not waiting:
            return
        events = [event for change in waiting for event in change.events]
        orders = {name: order for change in waiting for name, order in change.orders.items()}
        pasts = {name: past for change in waiting for name, past in change.pasts.items()}
        generation = max(change.generation for change in waiting)
        with contextlib.suppress(OSError):  # the store has logged it; the cluster has it all
            self._cache.keep(events, generation, orders, pasts)


def _parts(change: Change) -> Iterator[Change]:
    """Yield the parts of a change of which each is one record."""
    if change.orders:
        yield Change(change.events, change.orders, change.pasts, change.generation)
        return
    for event in change.events:
        name = event.entry.client.name
        pasts = {name: change.pasts[name]} if name in change.pasts else NO_PASTS
        yield Change([event], NO_ORDERS, pasts, change.generation)
