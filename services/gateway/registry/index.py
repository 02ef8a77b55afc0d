"""Entries by holder, by the place that copies go to, and by the connection that holds them. No I/O."""

from collections import Counter
from collections.abc import Collection

from services.gateway.registry.entry import Entry


class Index:
    """Finds entries otherwise than by name."""

    def __init__(self) -> None:
        self.collectors = 0
        self.by_holder: Counter[str] = Counter()
        self._held: dict[int, set[str]] = {}
        self._at: dict[tuple[str, int], dict[str, Entry]] = {}

    def at(self, address: str, port: int) -> Collection[Entry]:
        """Return the collectors whose copies go to this address and port."""
        return self._at.get((address, port), {}).values()

    def held_by(self, peer: int) -> Collection[str]:
        """Return the names of entries that last as long as this peer's connection."""
        return self._held.get(peer, ())

    def enter(self, entry: Entry) -> None:
        """Note an entry that has come."""
        client = entry.client
        self.by_holder[entry.peer.rights.holder] += 1
        if client.streams:
            self.collectors += 1
            self._at.setdefault(client.socket_address, {})[client.name] = entry
        if entry.held:
            self._held.setdefault(entry.peer.id, set()).add(client.name)

    def forget(self, entry: Entry) -> None:
        """Note that an entry has gone, as it was when it came."""
        client = entry.client
        self.by_holder[entry.peer.rights.holder] -= 1
        if client.streams:
            self.collectors -= 1
            place = self._at[client.socket_address]
            del place[client.name]
            if not place:
                del self._at[client.socket_address]
        if entry.held:
            held = self._held[entry.peer.id]
            held.discard(client.name)
            if not held:
                del self._held[entry.peer.id]
