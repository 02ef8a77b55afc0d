"""Leases of entries: their start, their end, and times in which nothing expires. No I/O."""

import math
from collections.abc import Callable, Collection, Iterable

from services.gateway.registry.entry import Entry
from services.gateway.registry.expiry_pause import ExpiryPause


class Leases:
    """The leases of all entries; `clock` gives seconds, `preserve_seconds` limits the time without expiry."""

    def __init__(self, clock: Callable[[], float], preserve_seconds: float) -> None:
        self.measures: Callable[[Entry], bool] = lambda _entry: True
        """Says whether this gateway measures an entry's lease; in a cluster its home does."""
        self._clock = clock
        self._pause = ExpiryPause(preserve_seconds)
        self._next_expiry = math.inf

    @property
    def active(self) -> bool:
        """Return whether any entry may expire."""
        return self._next_expiry < math.inf

    @property
    def preserving(self) -> bool:
        """Return whether too many renewals are missing to blame the clients: none of other hosts expires meanwhile."""
        return self._pause.holds

    def begin(self, entry: Entry) -> None:
        """Give an entry its whole lease, from now on, if it is measured here."""
        entry.expires_at = math.inf
        if entry.ttl and self.measures(entry):
            entry.renewed_at = self._clock()
            entry.expires_at = entry.renewed_at + entry.ttl
            self._next_expiry = min(self._next_expiry, entry.expires_at)

    def end(self, entries: Iterable[Entry]) -> None:
        """Let these entries expire at the next check, whatever is left of their time."""
        for entry in entries:
            entry.expires_at = self._next_expiry = min(entry.expires_at, self._clock())

    def expires_in(self, entry: Entry) -> float | None:
        """Return the seconds until an entry expires; None: it does not. All of its time where another measures it."""
        if entry.ttl and not self.measures(entry):
            return entry.ttl
        return None if entry.expires_at == math.inf else round(max(0.0, entry.expires_at - self._clock()), 3)

    def note_expired(self, entry: Entry) -> None:
        """Note that an entry has expired, wherever its lease was measured."""
        self._pause.note_expired(filter(_is_remote, [entry]), self._clock())

    def expire(self, entries: Collection[Entry], remove: Callable[[list[Entry]], None]) -> None:
        """Remove the entries whose time is up, by `remove`; those that are still there are tried again."""
        now = self._clock()
        if now < self._next_expiry:
            return
        overdue = [entry for entry in entries if entry.expires_at <= now]
        self._pause.judge(filter(_is_remote, entries), list(filter(_is_remote, overdue)), now)
        if self.preserving:
            overdue = [entry for entry in overdue if not _is_remote(entry)]
        if overdue:
            remove(overdue)
        self._next_expiry = min((entry.expires_at for entry in entries), default=math.inf)


def _is_remote(entry: Entry) -> bool:
    """Return whether a network may be what keeps its renewals away: clients of this host have no holder."""
    return bool(entry.peer.rights.holder)
