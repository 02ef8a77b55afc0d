"""How entries and events look to clients: JSON, one line each. No I/O."""

from typing import Final

import msgspec

from services.gateway.registry.condition import Word
from services.gateway.registry.entry import Entry, Event
from services.gateway.registry.registry import Registry
from shared.client import ListedClient

_encode: Final = msgspec.json.Encoder().encode


class View(ListedClient, frozen=True, kw_only=True):
    """An entry in full, as clients see it."""

    generation: int
    expires_in: float | None
    health: Word
    health_since: float | None
    health_count: int


def show_client(registry: Registry, entry: Entry) -> View:
    """An entry as it is shown now, in the condition that it was last looked at."""
    client, condition = entry.client, entry.condition
    return View(
        **client.terms,
        address=client.address,
        port=client.port,
        generation=client.generation,
        expires_in=registry.expires_in(entry),
        health=condition.word,
        health_since=registry.lasted(condition) if client.streams else None,
        health_count=condition.count,
    )


def event_line(registry: Registry, event: Event) -> bytes:
    """A change of the registry, as watchers get it."""
    client = event.entry.client
    if event.kind in ("joined", "changed"):
        return json_line(event=event.kind, revision=event.revision, client=show_client(registry, event.entry))
    return json_line(event=event.kind, revision=event.revision, name=client.name, generation=client.generation)


def health_line(registry: Registry, entry: Entry) -> bytes:
    """A collector's word, as watchers get it."""
    client, condition = entry.client, entry.condition
    return json_line(
        event="health",
        revision=registry.commit(),
        name=client.name,
        generation=client.generation,
        health=condition.word,
        health_since=registry.lasted(condition),
        health_count=condition.count,
    )


def json_line(**facts: object) -> bytes:
    """One JSON object with its newline."""
    return _encode(facts) + b"\n"
