"""Groups of collectors: each belongs to the holder of its members, whatever others call theirs. No I/O.

The bus has an identifier in place of a group's name, made with a secret. So two holders never share a stream, and
nobody can work out which member gets the datagrams of a source: the routers' hash depends on the identifier.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable
from typing import Final, Literal

import msgspec

from services.gateway.admission.peer import Peer
from services.gateway.registry.entry import Entry, Origin
from shared.client import Client, Source
from shared.serving_nodes import Owners

SECRET_BYTES: Final = 32
IDENTIFIER_BYTES: Final = 16


class Groups:
    """The groups that there are, and how many members take copies of which source."""

    def __init__(self, secret: bytes) -> None:
        self.owners = Owners()
        """The nodes of the cluster that serve collectors; a group has one."""
        self.secret = secret
        self._members: Counter[tuple[str, Source]] = Counter()

    def identify(self, group: str, peer: Peer, origin: Origin) -> str:
        """Return the bus's identifier of a group. A group of the settings is never the same as one of a client."""
        owner = msgspec.json.encode((origin is Origin.SETTINGS, peer.rights.holder, group))
        return hashlib.blake2b(owner, digest_size=IDENTIFIER_BYTES, key=self.secret).hexdigest()

    def for_bus(self, entry: Entry) -> Client:
        """Return the client as the bus has it."""
        client, node = entry.client, self.owners.pin(entry.client.address, entry.node)
        if not (client.group or node):
            return client
        group = client.group and self.identify(client.group, entry.peer, entry.origin)
        return msgspec.structs.replace(client, group=group, node=node)

    def owner(self, entry: Entry) -> str:
        """Return the node that serves a collector; empty: nobody does, or this host is no node."""
        return self.owners.owner(self.for_bus(entry)) if entry.client.streams else ""

    def word(self, entry: Entry) -> Literal["elsewhere"] | None:
        """Return the word of a collector that another node serves."""
        return "elsewhere" if self.owners.nodes and self.owner(entry) not in (self.owners.own, "") else None

    def change_secret(self, secret: bytes, members: Iterable[Entry]) -> None:
        """Make identifiers with another secret from now on, of these members too."""
        self.secret = secret
        self._members.clear()
        for entry in members:
            self.note(entry, 1)

    def note(self, entry: Entry, change: int) -> None:
        """Note a member that has come (1) or gone (-1)."""
        client = self.for_bus(entry)
        if client.group:
            self._members[client.group, client.source] += change
            if not self._members[client.group, client.source]:
                del self._members[client.group, client.source]

    def count(self, identifier: str, source: Source) -> int:
        """Return how many members of a group take copies of a source."""
        return self._members[identifier, source]
