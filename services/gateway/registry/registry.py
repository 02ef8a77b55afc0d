"""The table of clients and their leases. No I/O; the clock and the store for changes are handed in.

It checks nothing: `admission/decision.py` has decided before whether a change may be made. Every change is an event
with a number of its own (`revisions.py`). Code that shows a revision to the bus commits first, so a revision always
means the same content.
"""

import itertools
import math
import secrets
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Final, get_args

import msgspec

from services.gateway.admission.peer import Peer
from services.gateway.protocol.names_answer import NamesList
from services.gateway.registry.changes import Change, Changes, Keep, LocalChanges, T, keep_nothing
from services.gateway.registry.condition import Condition, Serving, word_without_report
from services.gateway.registry.entry import NO_ORDERS, Entry, Event, EventKind, Orders, Origin
from services.gateway.registry.groups import SECRET_BYTES, Groups
from services.gateway.registry.index import Index
from services.gateway.registry.leases import Leases
from services.gateway.registry.reached_places import Pasts
from services.gateway.registry.revisions import Revisions
from shared.bus.bodies.health_message import Health
from shared.bus.bodies.journal_messages import CatchUpReport
from shared.client import Client, Source, Streams, Withheld

RETURN_SECONDS: Final = 30.0
"""The lease, after a restart of the gateway, of an entry that was held by a connection."""


class Registry:
    """All entries, by name. A change that can't be stored raises OSError and is not made."""

    def __init__(
        self,
        clock: Callable[[], float],
        first_generation: int,
        keep: Keep = keep_nothing,
        preserve_seconds: float = 0.0,
        group_secret: bytes | None = None,
        pasts: Pasts | None = None,
    ) -> None:
        self.groups = Groups(group_secret or secrets.token_bytes(SECRET_BYTES))
        self.names = NamesList()
        self.serving: dict[Source, Serving] = {source: Serving() for source in get_args(Source)}
        self.pasts = pasts or Pasts(clock, clock)
        self.leases = Leases(clock, preserve_seconds)
        self.withheld: dict[str, Withheld] = {}
        """Orders by name: they outlast the entry, so that a collector does not end one by signing up anew."""
        self._entries: dict[str, Entry] = {}
        self._index = Index()
        self.node, self.boot = "", 0
        """The node that this is, and the boot of its gateway, where several nodes share the list."""
        self._clock = clock
        self._keep = keep
        self.changes: Changes = LocalChanges(self.renew)
        self._planned: list[Change] | None = None
        self.generation = first_generation - 1  # the last one given
        self._revisions = Revisions()
        self.pop_events, self.pop_changes = self._revisions.pop_events, self._revisions.pop_changes
        self.revision = 0
        """The revision of the list. The bus has a count of its own: another one where several nodes share the list."""
        self._silent = 0
        self._refreshed_version: tuple[int, ...] = ()
        self._word_changed: dict[str, Entry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def collectors(self) -> int:
        """The number of entries that get copies."""
        return self._index.collectors

    def entries(self) -> Collection[Entry]:
        """Return every entry, in order of first registration."""
        return self._entries.values()

    def find(self, name: str) -> Entry | None:
        """Return the entry of that name, if there is one."""
        return self._entries.get(name)

    def count_of_holder(self, holder: str) -> int:
        """Return the number of entries that belong to a holder."""
        return self._index.by_holder[holder]

    def at(self, address: str, port: int) -> Collection[Entry]:
        """Return the collectors whose copies go to this address and port."""
        return self._index.at(address, port)

    def grant(
        self,
        client: Client,
        peer: Peer,
        origin: Origin,
        *,
        ttl: float = 0.0,
        hold: bool = False,
        proven: bool = False,
    ) -> Entry:
        """Enter `client` under a new generation, for `ttl` seconds (0: no limit), in place of its name's entry.

        With `hold` the entry lasts no longer than the peer's connection.
        """
        event = self._entering(client, peer, origin, 1, self.revision + 1, ttl, hold, proven)
        self._make([event])
        return event.entry

    def _entering(
        self,
        client: Client,
        peer: Peer,
        origin: Origin,
        number: int,
        revision: int,
        ttl: float = 0.0,
        hold: bool = False,
        proven: bool = False,
    ) -> Event:
        """Return the event that enters a client, as the `number`th of those entered together."""
        kind: EventKind = "changed" if client.name in self._entries else "joined"
        client = self._complete(client, self.generation + number)
        entry = Entry(client, origin, peer, ttl, math.inf, revision, hold, self._clock(), proven)
        entry.home = entry.node = self.node
        entry.boot = self.boot
        return Event(kind, revision, entry)

    def _complete(self, client: Client, generation: int) -> Client:
        """Return a client with what it does not ask for itself."""
        return msgspec.structs.replace(client, generation=generation, withheld=self.withheld.get(client.name))

    def _replace(self, entry: Entry) -> None:
        present = self._entries.get(entry.client.name)
        if present is not None:
            self._forget(present)
        self._enter(entry)

    def restore(self, entries: Iterable[Entry], revision: int, withheld: Orders = NO_ORDERS) -> None:
        """Enter the entries and orders that an earlier start kept, as they were at `revision`; leases begin anew."""
        self._revisions.restore(revision)
        self.revision = revision
        self._obey(withheld)
        for entry in entries:
            if entry.held and not entry.ttl:
                entry.ttl = RETURN_SECONDS  # the restart ended its connection, and the client may come back
            if entry.client.resume:
                entry.client = msgspec.structs.replace(entry.client, resume=self.pasts.resumed(entry))
            self._enter(entry)

    def configure(self, clients: Iterable[Client], hosts: Mapping[str, str] = MappingProxyType({})) -> None:
        """Make exactly these the collectors of the settings, or change nothing; unchanged ones stay as they are.

        A collector of the settings replaces a client that has signed up under its name. `hosts` has the host names of
        those that the settings name so.
        """
        wanted = {client.name: client for client in clients}
        own = (each for each in self._entries.values() if each.origin is Origin.SETTINGS and each.node == self.node)
        gone = [entry for entry in own if entry.client.name not in wanted]
        events = [Event("left", revision, entry) for revision, entry in enumerate(gone, self.revision + 1)]
        fresh = [client for client in wanted.values() if not self._is_configured(client, hosts.get(client.name, ""))]
        for number, client in enumerate(fresh, 1):
            peer = Peer(0, client.address, client.port)
            if client.catch_up:
                present = self._entries.get(client.name)
                left = self.pasts.left(client.name, client.streams, peer.rights.holder, present)
                client = msgspec.structs.replace(client, resume=left)
            revision = self.revision + len(gone) + number
            event = self._entering(client, peer, Origin.SETTINGS, number, revision)
            event.entry.host = hosts.get(client.name, "")
            events.append(event)
        if events:
            self._make(events)

    def _is_configured(self, client: Client, host: str) -> bool:
        entry = self._entries.get(client.name)
        if entry is None or entry.origin is not Origin.SETTINGS or entry.host != host:
            return False
        wanted = msgspec.structs.replace(client, resume=entry.client.resume)
        return entry.client == self._complete(wanted, entry.client.generation)

    def renew(self, entry: Entry) -> float | None:
        """Restart the lease of an entry; return the seconds until it expires."""
        self.leases.begin(entry)
        return self.leases.expires_in(entry)

    def move(self, entry: Entry) -> None:
        """Measure an entry's lease here from now on, though another node was its home."""
        self._make([Event("renewed", self.revision, replace(entry, home=self.node))])

    def release(self, entry: Entry) -> None:
        """Remove an entry at its client's request."""
        self._remove([entry], "left")

    def expel(self, entries: Sequence[Entry]) -> None:
        """Remove entries without a request; later, if that can't be stored now."""
        self._remove_or_retry(entries, "left")

    def narrow(self, narrowed: Sequence[tuple[Entry, Streams]]) -> None:
        """Leave entries these streams only; each keeps its generation, and its lease begins anew."""
        self._amend([(entry, msgspec.structs.replace(entry.client, streams=streams)) for entry, streams in narrowed])

    def withhold(self, entry: Entry, order: Withheld) -> None:
        """Send an entry's collector nothing from now on, nor any later one of its name; else as `narrow`."""
        self.order(entry.client.name, order)

    def end_withholding(self, name: str) -> None:
        """Let the collector of this name have copies again, if it is here; else as `narrow`."""
        self.order(name, None)

    def order(self, name: str, order: Withheld | None) -> None:
        """Note an order for the collector of this name, whether it is here or not; else as `narrow`."""
        entry = self._entries.get(name)
        amended = [(entry, msgspec.structs.replace(entry.client, withheld=order))] if entry else []
        self._amend(amended, {name: order})

    def _amend(self, amended: Sequence[tuple[Entry, Client]], orders: Orders = NO_ORDERS) -> None:
        """Give entries these clients, which have their names, addresses and generations."""
        events = [
            Event("changed", revision, replace(entry, client=client, revision=revision))
            for revision, (entry, client) in enumerate(amended, self.revision + 1)
        ]
        if events or orders:
            self._make(events, orders)

    def note_behind(self, body: CatchUpReport) -> None:
        """Note the report of a sender on collectors that catch up, or have left. OSError when it can't be stored."""
        level = []
        for told in body.behind:
            entry = self._entries.get(told.name)
            if entry and entry.client.source != body.source:
                entry = None
            self.pasts.note_behind(told, entry)
            if entry and told.state == "level" and entry.client.generation == told.generation and entry.client.resume:
                level.append((entry, msgspec.structs.replace(entry.client, resume=None)))
        self._amend(level)

    def holds_any(self, peer: Peer) -> bool:
        """Return whether an entry lasts as long as this peer's connection."""
        return bool(self._index.held_by(peer.id))

    def release_held(self, peer: Peer) -> None:
        """Remove the entries that lasted as long as this peer's connection."""
        self._remove_or_retry([self._entries[name] for name in self._index.held_by(peer.id)], "left")

    def expire(self) -> None:
        """Remove the entries whose time is up."""
        self.leases.expire(self._entries.values(), lambda overdue: self._remove_or_retry(overdue, "expired"))

    def commit(self) -> int:
        """Put the changes so far into one for the bus, and return the revision that the registry is at."""
        return self._revisions.commit()

    def note_health(self, boot: int, body: Health) -> None:
        """Note the report of collectors by a service that sends copies, started as `boot`."""
        self.serving[body.source].note_health(boot, body, self._clock())

    def refresh_condition(self, entry: Entry) -> None:
        """Update an entry's condition; note a changed word, unless the entry's event has still to be sent."""
        client, told = entry.client, entry.condition
        serving = self.serving[client.source]
        word = word_without_report(client) or self.groups.word(entry) or serving.word(entry.revision)
        condition = serving.trouble(client.name, client.generation) if word == "ok" else None
        if condition is None:
            lost = serving.lost(client.name, client.generation)
            if (told.word, told.lost) == (word, lost):
                condition = told
            else:
                condition = Condition(word, told.since if told.word == word else self._clock(), lost)
        entry.condition = condition
        present = self._entries.get(client.name) is entry
        if present and condition.word != told.word and entry.revision <= self._revisions.popped:
            self._word_changed[client.name] = entry

    def refresh_conditions(self) -> None:
        """Update every entry's condition, if any report came since the last time."""
        version = self.version()
        if version != self._refreshed_version:
            self._refreshed_version = version
            for entry in self._entries.values():
                self.refresh_condition(entry)

    def pop_changed_words(self, most: int) -> list[Entry]:
        """Return up to `most` of the entries whose word has changed since they were last returned."""
        names = list(itertools.islice(self._word_changed, most))
        changed = [self._word_changed.pop(name) for name in names]
        return [entry for entry in changed if self._entries.get(entry.client.name) is entry]

    def seconds_in(self, condition: Condition) -> float:
        """Return the seconds that a condition has lasted."""
        return round(max(0.0, self._clock() - condition.since), 3)

    def version(self) -> tuple[int, ...]:
        """Return numbers that change with any entry or its health; the first is the revision."""
        told = [(serving.served, serving.unanswered, serving.reported) for serving in self.serving.values()]
        return self.commit(), self._silent, self.groups.owners.changes, *itertools.chain.from_iterable(told)

    def _enter(self, entry: Entry) -> None:
        client = entry.client
        entry.condition = Condition(word_without_report(client) or "fresh", self._clock())
        self._entries[client.name] = entry
        self._index.enter(entry)
        self.names.put(client)
        self.groups.note(entry, 1)
        if client.streams:
            self.serving[client.source].newest = entry.revision
        self.leases.begin(entry)

    def _forget(self, entry: Entry) -> None:
        self._index.forget(entry)
        self.groups.note(entry, -1)

    def _ends_one(self, event: Event) -> bool:
        """Return whether an event ends an entry: it removes it, or puts one of another generation in its place."""
        present = self._entries.get(event.entry.client.name)
        return present is not None and (
            event.kind != "changed" or present.client.generation != event.entry.client.generation
        )

    def _remove(self, entries: Sequence[Entry], kind: EventKind) -> None:
        if entries:
            self._make([Event(kind, revision, entry) for revision, entry in enumerate(entries, self.revision + 1)])

    def _drop(self, entry: Entry) -> None:
        self._forget(self._entries.pop(entry.client.name))
        self.names.remove(entry.client.name)
        self.pasts.forget_progress(entry.client.name)

    def _remove_or_retry(self, entries: Sequence[Entry], kind: EventKind) -> None:
        """Remove entries without a request; what can't be stored now is tried again by `expire`."""
        try:
            self._remove(entries, kind)
        except OSError:
            self.leases.end(entries)

    def _obey(self, orders: Orders) -> None:
        for name, order in orders.items():
            if order is None:
                self.withheld.pop(name, None)
            else:
                self.withheld[name] = order

    def plan(self, act: Callable[[], T], ahead: int = 0) -> tuple[T, list[Change]]:
        """Return what `act` returns, and the changes that it would make by methods of this registry; make none.

        They get the revisions and generations behind those of `ahead` events that are planned already.
        """
        now, planned = (self.revision, self.generation), list[Change]()
        self._planned = planned
        self.revision, self.generation = self.revision + ahead, self.generation + ahead
        try:
            return act(), planned
        finally:
            self._planned = None
            self.revision, self.generation = now

    def _make(self, events: Sequence[Event], orders: Orders = NO_ORDERS) -> None:
        """Store a change and make it; or note it, while changes are only planned."""
        generation = max([self.generation, *(event.entry.client.generation for event in events)])
        gone = [self._entries[event.entry.client.name] for event in events if self._ends_one(event)]
        pasts = {entry.client.name: past for entry in gone if (past := self.pasts.left_by(entry))}
        change = Change(events, orders, pasts, generation)
        if self._planned is not None:
            self._planned.append(change)
            return
        self._keep(events, generation, orders, pasts)
        self.apply(change)

    def apply(self, change: Change) -> None:
        """Make a change that is stored, and note it for the bus and for watchers."""
        self.pasts.note(change.pasts)
        self.generation = max(self.generation, change.generation)
        self._obey(change.orders)
        for event in change.events:
            entry, self.revision = event.entry, event.revision
            if event.kind == "renewed":
                self._put_silently(entry)
            elif event.kind in ("joined", "changed"):
                entry.revision = self._revisions.note(event, self.groups.for_bus(entry))
                self._replace(entry)
            else:
                self._revisions.note(event, entry.client)
                self._drop(self._entries[entry.client.name])
                if event.kind == "expired":
                    self.leases.note_expired(entry)

    def _put_silently(self, entry: Entry) -> None:
        """Put an entry in place of itself: neither its copies nor its condition change."""
        self._silent += 1
        present = self._entries[entry.client.name]
        self._forget(present)
        self._enter(entry)
        entry.revision, entry.condition = present.revision, present.condition
