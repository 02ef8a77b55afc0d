"""The table of clients and their leases. No I/O; the clock is handed in, and so is what keeps each change for good.

Every change is an event with a revision of its own. For the bus they gather until `commit` puts them into one message;
whoever shows a revision to the bus commits first, so a revision always means the same content.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Final, Protocol, get_args

import msgspec

from services.gateway.admission.peer import Peer
from services.gateway.protocol.names_list import NamesList
from services.gateway.protocol.requests import RequestError
from services.gateway.registry.condition import Condition, Serving
from services.gateway.registry.entry import Entry, Event, EventKind, Origin
from services.gateway.registry.preservation import Preservation
from shared.bus.messages import Health, RegistryChange
from shared.client import Client, Source

MAX_CHANGE: Final = 64
"""Clients in one change: the largest entry has under 16 KB, and a bus message at most 1 MiB."""

RETURN_SECONDS: Final = 30.0
"""After a restart of ours, for who held an entry by its connection."""


class Keep(Protocol):
    """Keeps changes for good before they are made, all or none; `RequestError` when that can't be done."""

    def __call__(self, events: Sequence[Event], generation: int) -> None:
        """`generation` is the last one given."""


def keep_nothing(events: Sequence[Event], generation: int) -> None:
    """For a registry that ends with its process."""


class Registry:
    """All entries, by name. What it refuses it raises as `RequestError`."""

    def __init__(
        self,
        max_clients: int,
        clock: Callable[[], float],
        first_generation: int,
        keep: Keep = keep_nothing,
        preserve_seconds: float = 0.0,
        max_clients_per_holder: float = math.inf,
    ) -> None:
        self.names = NamesList()
        self.collectors = 0
        self.serving: dict[Source, Serving] = {source: Serving() for source in get_args(Source)}
        self._entries: dict[str, Entry] = {}
        self._held: dict[int, set[str]] = {}
        self._by_holder: Counter[str] = Counter()
        self._max_clients = max_clients
        self._max_clients_per_holder = max_clients_per_holder
        self._clock = clock
        self._keep = keep
        self._preservation = Preservation(preserve_seconds)
        self._generation = first_generation - 1
        self._next_expiry = math.inf
        self._revision = self._committed = 0
        self._joined: dict[str, Client] = {}
        self._left: set[str] = set()
        self._changes: list[RegistryChange] = []
        self._events: list[Event] = []
        self._taken_revision = 0
        self._looked_at: tuple[int, ...] = ()
        self._word_changed: dict[str, Entry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def entries(self) -> Iterable[Entry]:
        """Every entry, in order of first registration."""
        return self._entries.values()

    def find(self, name: str) -> Entry | None:
        """The entry of that name, if there is one."""
        return self._entries.get(name)

    def grant(
        self,
        client: Client,
        peer: Peer,
        origin: Origin,
        *,
        ttl: float = 0.0,
        hold: bool = False,
        take_over: bool = False,
    ) -> Entry:
        """Enter `client`, under a generation of its own, for `ttl` seconds; 0: until it leaves."""
        present = self._entries.get(client.name)
        if present is not None:
            _check_replaceable(present, peer, origin, take_over)
        else:
            self._check_room(peer.rights.holder)
        return self._put(client, peer, origin, ttl, hold)

    def _check_room(self, holder: str) -> None:
        """Raise `RequestError` when there are as many entries as there may be, in all or of this holder."""
        if len(self._entries) >= self._max_clients:
            raise RequestError(
                "registry_full", f"{self._max_clients} clients are signed up; raise [gateway] max_clients, or retry"
            )
        if holder and self._by_holder[holder] >= self._max_clients_per_holder:
            most = self._max_clients_per_holder
            raise RequestError(
                "registry_full", f"{holder!r} has {most} clients signed up, as many as it may; let some go"
            )

    def _put(self, client: Client, peer: Peer, origin: Origin, ttl: float = 0.0, hold: bool = False) -> Entry:
        event = self._entering(client, peer, origin, 1, self._revision + 1, ttl, hold)
        self._record([event])
        self._replace(event.entry)
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
    ) -> Event:
        """Return what enters a client, as the `number`th of those that are entered together."""
        kind: EventKind = "changed" if client.name in self._entries else "joined"
        client = msgspec.structs.replace(client, generation=self._generation + number)
        return Event(kind, revision, Entry(client, origin, peer, ttl, math.inf, revision, hold, self._clock()))

    def _replace(self, entry: Entry) -> None:
        present = self._entries.get(entry.client.name)
        if present is not None:
            self._forget(present)
        self._enter(entry)

    def restore(self, entries: Iterable[Entry], revision: int) -> None:
        """Enter what an earlier start kept, as it was at `revision`; each lease begins anew."""
        self._revision = self._committed = revision
        for entry in entries:
            if entry.held and not entry.ttl:
                entry.ttl = RETURN_SECONDS  # its connection has gone with us, and may come back
            self._enter(entry)

    def configure(self, clients: Iterable[Client]) -> None:
        """Have exactly these as collectors of the settings, or change nothing; one that is there stays as it is.

        The operator's word goes before that of who has signed up under such a name.
        """
        wanted = {client.name: client for client in clients}
        present = [entry for entry in self._entries.values() if entry.origin is Origin.SETTINGS]
        gone = [entry for entry in present if entry.client.name not in wanted]
        events = [Event("left", self._revision + number, entry) for number, entry in enumerate(gone, 1)]
        fresh = [client for client in wanted.values() if not self._is_configured(client)]
        for number, client in enumerate(fresh, 1):
            peer = Peer(0, client.address, client.port)
            events.append(self._entering(client, peer, Origin.SETTINGS, number, self._revision + len(gone) + number))
        if events:
            self._record(events)
        self._drop(gone)
        for event in events[len(gone) :]:
            self._replace(event.entry)

    def _is_configured(self, client: Client) -> bool:
        entry = self._entries.get(client.name)
        same = entry and entry.client == msgspec.structs.replace(client, generation=entry.client.generation)
        return entry is not None and entry.origin is Origin.SETTINGS and bool(same)

    def renew(self, name: str, generation: int, peer: Peer) -> Entry:
        """Let the entry's time begin anew."""
        entry = self._entry(name, generation, peer)
        self._prolong(entry)
        return entry

    def release(self, name: str, generation: int, peer: Peer) -> None:
        """Take the entry away because who controls it says so."""
        self._remove([self._entry(name, generation, peer)], "left")

    def expel(self, names: Sequence[str]) -> None:
        """Take entries away whatever who made them says."""
        self._take_away([self._entries[name] for name in names], "left")

    def holds_any(self, peer: Peer) -> bool:
        """Whether an entry lasts as long as this peer's connection."""
        return peer.id in self._held

    def release_held(self, peer: Peer) -> None:
        """Take away what lasted as long as this peer's connection."""
        self._take_away([self._entries[name] for name in self._held.get(peer.id, ())], "left")

    def expire(self) -> None:
        """Take away the entries whose time is up."""
        now = self._clock()
        if now < self._next_expiry:
            return
        overdue = [entry for entry in self._entries.values() if entry.expires_at <= now]
        self._preservation.judge(self._entries.values(), len(overdue), now)
        if overdue and not self.preserving and self._take_away(overdue, "expired"):
            self._preservation.note_expired(len(overdue), now)
        self._next_expiry = min((entry.expires_at for entry in self._entries.values()), default=math.inf)

    def expires_in(self, entry: Entry) -> float | None:
        """Seconds until the entry expires; None: it does not."""
        return None if entry.expires_at == math.inf else round(max(0.0, entry.expires_at - self._clock()), 3)

    @property
    def preserving(self) -> bool:
        """Whether so many renewals are missing at once that the fault is hardly theirs: nothing expires meanwhile."""
        return self._preservation.holds

    @property
    def leased(self) -> bool:
        """Whether any entry may expire."""
        return self._next_expiry < math.inf

    def commit(self) -> int:
        """Put the changes so far into one for the bus, and return the revision that the registry is at."""
        if self._joined or self._left:
            change = RegistryChange(self._committed, self._revision, list(self._joined.values()), sorted(self._left))
            self._changes.append(change)
            self._committed = self._revision
            self._joined, self._left = {}, set()
        return self._revision

    def pop_events(self) -> list[Event]:
        """Every change since the last call, in order."""
        events, self._events = self._events, []
        self._taken_revision = self._revision
        return events

    def pop_changes(self) -> list[RegistryChange]:
        """The committed changes since the last call."""
        changes, self._changes = self._changes, []
        return changes

    def note_health(self, boot: int, body: Health) -> None:
        """Take in what one who sends copies, started as `boot`, says of collectors."""
        self.serving[body.source].note_health(boot, body, self._clock())

    def refresh_condition(self, entry: Entry) -> None:
        """Bring an entry's condition up to date. A word that has changed is to be told, unless its event still is."""
        client, told = entry.client, entry.condition
        serving = self.serving[client.source]
        word = serving.word(entry.revision) if client.streams else "ok"
        condition = serving.trouble(client.name, client.generation) if word == "ok" else None
        if condition is None:
            condition = told if told.word == word else Condition(word, self._clock())
        entry.condition = condition
        present = self._entries.get(client.name) is entry
        if present and condition.word != told.word and entry.revision <= self._taken_revision:
            self._word_changed[client.name] = entry

    def refresh_conditions(self) -> None:
        """Bring every entry's condition up to date, if anything was said since the last time."""
        version = self.version()
        if version != self._looked_at:
            self._looked_at = version
            for entry in self._entries.values():
                self.refresh_condition(entry)

    def pop_changed_words(self, most: int) -> list[Entry]:
        """Up to so many of the entries whose word has changed since they were last taken."""
        names = list(itertools.islice(self._word_changed, most))
        taken = [self._word_changed.pop(name) for name in names]
        return [entry for entry in taken if self._entries.get(entry.client.name) is entry]

    def lasted(self, condition: Condition) -> float:
        """Seconds for which it has been so."""
        return round(max(0.0, self._clock() - condition.since), 3)

    def version(self) -> tuple[int, ...]:
        """Differs whenever an entry or its health does; begins with the revision."""
        told = [(serving.served, serving.unanswered, serving.reported) for serving in self.serving.values()]
        return self.commit(), *itertools.chain.from_iterable(told)

    def _entry(self, name: str, generation: int, peer: Peer) -> Entry:
        entry = self._entries.get(name)
        if entry is not None and entry.origin is Origin.SETTINGS:
            raise RequestError("not_permitted", f"{name!r} is a [[collector]] of the settings; change it there")
        if entry is None or entry.client.generation != generation:
            raise RequestError("stale_generation", f"that entry of {name!r} is there no longer; register again")
        if not peer.controls(entry.peer):
            raise RequestError("not_permitted", f"{name!r} is not yours; who signed it up may do that, or scope admin")
        return entry

    def _prolong(self, entry: Entry) -> None:
        if entry.ttl:
            entry.renewed_at = self._clock()
            entry.expires_at = entry.renewed_at + entry.ttl
            self._next_expiry = min(self._next_expiry, entry.expires_at)

    def _enter(self, entry: Entry) -> None:
        client = entry.client
        entry.condition = Condition("fresh" if client.streams else "ok", self._clock())
        self._entries[client.name] = entry
        self._by_holder[entry.peer.rights.holder] += 1
        self.names.put(client)
        if client.streams:
            self.collectors += 1
            self.serving[client.source].newest = entry.revision
        if entry.held:
            self._held.setdefault(entry.peer.id, set()).add(client.name)
        self._prolong(entry)

    def _forget(self, entry: Entry) -> None:
        self._by_holder[entry.peer.rights.holder] -= 1
        self.collectors -= bool(entry.client.streams)
        if entry.held:
            held = self._held[entry.peer.id]
            held.discard(entry.client.name)
            if not held:
                del self._held[entry.peer.id]

    def _remove(self, entries: Sequence[Entry], kind: EventKind) -> None:
        if not entries:
            return
        self._record([Event(kind, self._revision + number, entry) for number, entry in enumerate(entries, 1)])
        self._drop(entries)

    def _drop(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            self._forget(self._entries.pop(entry.client.name))
            self.names.remove(entry.client.name)

    def _take_away(self, entries: Sequence[Entry], kind: EventKind) -> bool:
        """Remove entries that nobody asked to have removed: what can't be kept now is tried again by `expire`."""
        try:
            self._remove(entries, kind)
        except RequestError:
            for entry in entries:
                entry.expires_at = self._next_expiry = min(entry.expires_at, self._clock())
            return False
        return True

    def _record(self, events: Sequence[Event]) -> None:
        """Keep changes, and let the bus and whoever watches know of them."""
        generation = max(self._generation, *(event.entry.client.generation for event in events))
        self._keep(events, generation)
        self._generation = generation
        for event in events:
            client = event.entry.client
            self._revision = event.revision
            self._events.append(event)
            if event.kind in ("joined", "changed"):
                self._joined[client.name] = client
                self._left.discard(client.name)
            else:
                self._joined.pop(client.name, None)
                self._left.add(client.name)
            if len(self._joined) + len(self._left) >= MAX_CHANGE:
                self.commit()


def _check_replaceable(present: Entry, peer: Peer, origin: Origin, take_over: bool) -> None:
    """Raise `RequestError` unless this peer may put another entry in the place of `present`."""
    name = present.client.name
    own = present.peer.id == peer.id or (origin is Origin.NAMES and peer.controls(present.peer))
    if present.origin is origin and own:
        return
    if take_over and present.origin is Origin.SETTINGS:
        raise RequestError("not_permitted", f"{name!r} is a [[collector]] of the settings; change it there")
    holder = present.peer.rights.holder
    same = holder == peer.rights.holder if holder else present.peer.address == peer.address
    # Who held it has lost the connection in a restart of ours, and may be back: it need not know of that.
    orphaned = present.held and not present.peer.id and present.origin is origin
    if (take_over and (same or peer.rights.everything)) or (orphaned and same):
        return
    raise RequestError(
        "name_taken",
        f"{name!r} is signed up; choose another name, or register with take_over "
        + (f"as {holder!r}, whose it is" if holder else "from the address it came from"),
    )
