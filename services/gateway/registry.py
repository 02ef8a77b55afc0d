"""The table of clients and their leases. No I/O; the clock is handed in.

Changes gather until `commit` puts them under one revision; whoever shows a revision to anybody commits first, so a
revision always means the same content.
"""

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final, Literal, get_args

import msgspec

from services.gateway.names_list import NamesList
from services.gateway.requests import RequestError
from shared.registry import Client, Source
from shared.wire import RegistryChange

MAX_CHANGE: Final = 64
"""Clients in one change: the largest entry has under 8 KB, and a bus message at most 1 MiB."""

Health = Literal["fresh", "ok", "waiting"]
"""Of a collector's copies: not asked for yet, flowing, or nobody said so in time."""


class Origin(Enum):
    """How an entry was made."""

    SETTINGS = auto()
    NAMES = auto()
    JSON = auto()


@dataclass(frozen=True, slots=True)
class Visitor:
    """Who asks: a connection by its number, and the address and port it comes from."""

    id: int
    address: str
    port: int


@dataclass(slots=True)
class Entry:
    """A client and its lease.

    `revision` is that in which the client joined; `expires_at` is infinite without `ttl`; one that is `held` lasts no
    longer than its visitor's connection.
    """

    client: Client
    origin: Origin
    visitor: Visitor
    ttl: float
    expires_at: float
    revision: int
    held: bool


@dataclass(slots=True)
class Serving:
    """What is known of the copies of one source, as revisions of the registry; -1: of none."""

    newest: int = -1
    """The last in which a collector joined."""
    served: int = -1
    """Copies flow to every collector of this one."""
    unanswered: int = -1
    """Nobody said in time that copies flow to those of this one."""

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

    def forget(self) -> None:
        """Who sent the copies has gone: nothing is known to be served until somebody says so again."""
        self.note_unanswered(self.served)
        self.served = -1

    def health(self, revision: int) -> Health:
        """How the copies of a collector do that joined in `revision`."""
        if revision <= self.served:
            return "ok"
        return "waiting" if revision <= self.unanswered else "fresh"


class Registry:
    """All entries, by name. What it refuses it raises as `RequestError`."""

    def __init__(self, max_clients: int, clock: Callable[[], float], first_generation: int) -> None:
        self.names = NamesList()
        self.collectors = 0
        self.serving: dict[Source, Serving] = {source: Serving() for source in get_args(Source)}
        self._entries: dict[str, Entry] = {}
        self._held: dict[int, set[str]] = {}
        self._max_clients = max_clients
        self._clock = clock
        self._generations = itertools.count(first_generation)
        self._next_expiry = math.inf
        self._revision = 0
        self._joined: dict[str, Client] = {}
        self._left: set[str] = set()
        self._changes: list[RegistryChange] = []

    def __len__(self) -> int:
        return len(self._entries)

    def entries(self) -> Iterable[Entry]:
        """Every entry, in order of first registration."""
        return self._entries.values()

    def grant(
        self,
        client: Client,
        visitor: Visitor,
        origin: Origin,
        *,
        ttl: float = 0.0,
        hold: bool = False,
        take_over: bool = False,
    ) -> Entry:
        """Enter `client`, under a generation of its own, for `ttl` seconds; 0: until it leaves."""
        present = self._entries.get(client.name)
        if present is not None:
            _check_replaceable(present, visitor, origin, take_over)
        elif len(self._entries) >= self._max_clients:
            raise RequestError(
                "registry_full", f"{self._max_clients} clients are signed up; raise [gateway] max_clients, or retry"
            )
        if present is not None:
            self._forget(present)
        client = msgspec.structs.replace(client, generation=next(self._generations))
        entry = Entry(client, origin, visitor, ttl, math.inf, self._revision + 1, hold)
        self._enter(entry)
        self._prolong(entry)
        self._commit_if_many()
        return entry

    def renew(self, name: str, generation: int) -> Entry:
        """Let the entry's time begin anew."""
        entry = self._entry(name, generation)
        self._prolong(entry)
        return entry

    def release(self, name: str, generation: int) -> None:
        """Take the entry away because who made it says so."""
        self._entry(name, generation)
        self._remove(name)

    def holds_any(self, visitor: Visitor) -> bool:
        """Whether an entry lasts as long as this visitor's connection."""
        return visitor.id in self._held

    def release_held(self, visitor: Visitor) -> None:
        """Take away what lasted as long as this visitor's connection."""
        for name in list(self._held.get(visitor.id, ())):
            self._remove(name)

    def expire(self) -> None:
        """Take away the entries whose time is up."""
        now = self._clock()
        if now < self._next_expiry:
            return
        for name in [name for name, entry in self._entries.items() if entry.expires_at <= now]:
            self._remove(name)
        self._next_expiry = min((entry.expires_at for entry in self._entries.values()), default=math.inf)

    def expires_in(self, entry: Entry) -> float | None:
        """Seconds until the entry expires; None: it does not."""
        return None if entry.expires_at == math.inf else round(max(0.0, entry.expires_at - self._clock()), 3)

    @property
    def leased(self) -> bool:
        """Whether any entry may expire."""
        return self._next_expiry < math.inf

    def commit(self) -> int:
        """Put the changes so far under one revision, and return the revision that the registry is at."""
        if self._joined or self._left:
            self._revision += 1
            self._changes.append(RegistryChange(self._revision, list(self._joined.values()), sorted(self._left)))
            self._joined, self._left = {}, set()
        return self._revision

    def take_changes(self) -> list[RegistryChange]:
        """The committed changes since the last call."""
        changes, self._changes = self._changes, []
        return changes

    def health(self, entry: Entry) -> Health:
        """How the entry's copies do."""
        return self.serving[entry.client.source].health(entry.revision) if entry.client.streams else "ok"

    def version(self) -> tuple[int, ...]:
        """Differs whenever an entry or its health does; begins with the revision."""
        told = [(serving.served, serving.unanswered) for serving in self.serving.values()]
        return self.commit(), *itertools.chain.from_iterable(told)

    def _entry(self, name: str, generation: int) -> Entry:
        entry = self._entries.get(name)
        if entry is not None and entry.origin is Origin.SETTINGS:
            raise RequestError("not_permitted", f"{name!r} is a [[collector]] of the settings; change it there")
        if entry is None or entry.client.generation != generation:
            raise RequestError("stale_generation", f"that entry of {name!r} is there no longer; register again")
        return entry

    def _prolong(self, entry: Entry) -> None:
        if entry.ttl:
            entry.expires_at = self._clock() + entry.ttl
            self._next_expiry = min(self._next_expiry, entry.expires_at)

    def _enter(self, entry: Entry) -> None:
        client = entry.client
        self._entries[client.name] = entry
        self.names.put(client)
        self._joined[client.name] = client
        self._left.discard(client.name)
        if client.streams:
            self.collectors += 1
            self.serving[client.source].newest = entry.revision
        if entry.held:
            self._held.setdefault(entry.visitor.id, set()).add(client.name)

    def _forget(self, entry: Entry) -> None:
        self.collectors -= bool(entry.client.streams)
        if entry.held:
            held = self._held[entry.visitor.id]
            held.discard(entry.client.name)
            if not held:
                del self._held[entry.visitor.id]

    def _remove(self, name: str) -> None:
        self._forget(self._entries.pop(name))
        self.names.remove(name)
        self._joined.pop(name, None)
        self._left.add(name)
        self._commit_if_many()

    def _commit_if_many(self) -> None:
        if len(self._joined) + len(self._left) >= MAX_CHANGE:
            self.commit()


def _check_replaceable(present: Entry, visitor: Visitor, origin: Origin, take_over: bool) -> None:
    """Raise `RequestError` unless this visitor may put another entry in the place of `present`."""
    name = present.client.name
    if present.origin is origin is Origin.NAMES or (present.origin is origin and present.visitor.id == visitor.id):
        return
    if take_over and present.origin is Origin.SETTINGS:
        raise RequestError("not_permitted", f"{name!r} is a [[collector]] of the settings; change it there")
    if take_over and present.visitor.address == visitor.address:
        return
    raise RequestError(
        "name_taken",
        f"{name!r} is signed up; choose another name, or register with take_over from the address it came from",
    )
