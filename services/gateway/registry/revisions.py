"""The number of each event of the registry, and the events that wait for watchers and for the bus. No I/O.

Generations begin with the microseconds since 1970, revisions with 1, and each grows by one a change. So neither is ever
far ahead of the clock.
"""

from typing import Final

from services.gateway.registry.entry import Event
from shared.bus.messages import RegistryChange
from shared.client import Client

MAX_CHANGE: Final = 56
"""Clients in one change: the largest entry has under 18 KB, and a bus message at most 1 MiB."""


CLOCK_ERROR_SECONDS: Final = 100 * 31_557_600
"""A century: the clock that a generation began with was not wrong by more. Clients may rely on 2**53 until then."""


def largest_number(unix_seconds: float) -> int:
    """Return the largest revision or generation that can have been given at a time; there is room for more behind it.

    A larger one is damage. Counting on from it would soon end where numbers end.
    """
    return int((unix_seconds + CLOCK_ERROR_SECONDS) * 1_000_000)


class Revisions:
    """Numbers events from `last` + 1 on. For the bus they gather until `commit` puts them into one change."""

    def __init__(self) -> None:
        self.last = 0
        self.popped = 0
        """The last revision that `pop_events` has returned."""
        self._committed = 0
        self._joined: dict[str, Client] = {}
        self._left: set[str] = set()
        self._changes: list[RegistryChange] = []
        self._events: list[Event] = []

    def restore(self, last: int) -> None:
        """Go on from the last revision of an earlier start."""
        self.last = self._committed = last

    def note(self, event: Event, client: Client) -> int:
        """Note an event that has happened; `client` is its entry as the bus shows it. Return the bus's revision."""
        self.last += 1
        self._events.append(event)
        if event.kind in ("joined", "changed"):
            self._joined[client.name] = client
            self._left.discard(client.name)
        else:
            self._joined.pop(client.name, None)
            self._left.add(client.name)
        if len(self._joined) + len(self._left) >= MAX_CHANGE:
            self.commit()
        return self.last

    def commit(self) -> int:
        """Put the events so far into one change for the bus, and return the last revision."""
        if self._joined or self._left:
            change = RegistryChange(self._committed, self.last, list(self._joined.values()), sorted(self._left))
            self._changes.append(change)
            self._committed = self.last
            self._joined, self._left = {}, set()
        return self.last

    def pop_events(self) -> list[Event]:
        """Return every event since the last call, in order."""
        events, self._events = self._events, []
        self.popped = self.last
        return events

    def pop_changes(self) -> list[RegistryChange]:
        """Return the committed changes since the last call."""
        changes, self._changes = self._changes, []
        return changes
