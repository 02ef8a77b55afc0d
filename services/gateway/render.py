"""Entries and events as clients see them: JSON, one line each. No I/O."""

from typing import Final

import msgspec
from msgspec import UNSET, UnsetType
from msgspec.structs import asdict

from services.gateway.registry.condition import Word
from services.gateway.registry.entry import Entry, Event
from services.gateway.registry.reached_places import Progress
from services.gateway.registry.registry import Registry
from shared.client import ListedClient, Withheld

_encode: Final = msgspec.json.Encoder().encode


class EntryView(ListedClient, frozen=True, kw_only=True):
    """An entry in full, as clients see it."""

    generation: int
    expires_in: float | None
    health: Word
    health_since: float | None
    lost: int
    withheld: Withheld | None
    catch_up: bool | UnsetType = UNSET
    catching_up: Progress | UnsetType = UNSET
    """The first only of a collector that gets from the journal what it misses; the second only while it gets that."""
    host: str | UnsetType = UNSET
    """Its host name in the settings; only where it has one."""
    node: str | UnsetType = UNSET
    """The node that serves it, empty: none does; only in a cluster."""


def show_client(registry: Registry, entry: Entry) -> EntryView:
    """Return an entry as it is shown now, in the condition of its last refresh."""
    client, condition = entry.client, entry.condition
    shown = asdict(client)
    del shown["resume"]
    shown["catch_up"] = client.catch_up or UNSET
    shown["node"] = registry.groups.owner(entry) if registry.groups.owners.nodes and client.streams else UNSET
    return EntryView(
        **shown,
        catching_up=registry.pasts.progress(entry) or UNSET,
        expires_in=registry.leases.expires_in(entry),
        health=condition.word,
        health_since=registry.seconds_in(condition) if client.streams else None,
        lost=condition.lost,
        host=entry.host or UNSET,
    )


def event_line(registry: Registry, event: Event) -> bytes:
    """Return a change of the registry, as watchers get it."""
    client = event.entry.client
    if event.kind in ("joined", "changed"):
        return json_line(event=event.kind, revision=event.revision, client=show_client(registry, event.entry))
    return json_line(event=event.kind, revision=event.revision, name=client.name, generation=client.generation)


def health_line(registry: Registry, entry: Entry) -> bytes:
    """Return a collector's word, as watchers get it."""
    client, condition = entry.client, entry.condition
    return json_line(
        event="health",
        revision=registry.revision,
        name=client.name,
        generation=client.generation,
        health=condition.word,
        health_since=registry.seconds_in(condition),
        lost=condition.lost,
    )


def json_line(**facts: object) -> bytes:
    """Return one JSON object with its newline."""
    return _encode(facts) + b"\n"
