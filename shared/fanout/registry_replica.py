"""The copy of the registry that a subscriber keeps: a snapshot in pieces, then numbered changes."""

from typing import Final

from shared.bus.bodies.nodes_message import Nodes
from shared.bus.messages import Envelope, RegistryChange, RegistrySnapshot, Status
from shared.bus.pieces import Assembler
from shared.client import Client, Source
from shared.ledger.counters import REVISION
from shared.serving_nodes import Owners

GATEWAY: Final = "gateway"
"""The gateway's own account, and the beginning of its name."""


class RegistryReplica:
    """Follows the gateway; `stale` says that a change is missing and a new snapshot has to be asked for.

    `version` grows with every change from any gateway, and in a cluster of its nodes, from -1 while either is unknown;
    `revision` is the present gateway's own.
    """

    def __init__(self, owners: Owners | None = None) -> None:
        self._owners = owners or Owners()
        self.clients: dict[str, Client] = {}
        self.revision = self.version = -1
        self.stale = False
        self._boot = -1
        self._assembler = Assembler[RegistrySnapshot]()

    @property
    def boot(self) -> int:
        """The boot id of the gateway that this registry is of; -1: of none yet."""
        return self._boot

    @property
    def handing_over(self) -> bool:
        """True from when other nodes come to serve until collectors are split anew: they wait for that."""
        return not self._owners.settled

    def apply_message(self, envelope: Envelope, body: RegistrySnapshot | RegistryChange | Nodes) -> bool:
        """Apply a message; return whether it changed the registry, or who serves whom."""
        if isinstance(body, Nodes):
            changed = self._owners.note(body)
        elif isinstance(body, RegistryChange):
            changed = self._change(envelope, body)
        else:
            changed = self._snapshot(envelope, body)
        self._note(changed)
        return changed

    def expect(self, boot: int, revision: int) -> None:
        """Note that the gateway that started as `boot` has published a revision: if it is not here, it was lost."""
        self.stale |= boot != self._boot or revision > self.revision

    def note_status(self, envelope: Envelope, body: Status) -> None:
        """Note a piece of a service's status: the gateway's tells its revision, for those whom it asks nothing."""
        revision = body.accounts.get(GATEWAY, {}).get(REVISION)
        if revision is not None and envelope.sender.startswith(f"{GATEWAY}."):
            self.expect(envelope.boot, revision)

    def check_nodes(self) -> None:
        """Do what is due of nodes each second."""
        self._note(self._owners.check())

    def _note(self, changed: bool) -> None:
        self.version += changed and self._owners.known and self._boot >= 0

    def split(self, source: Source) -> tuple[dict[str, Client], dict[str, Client]]:
        """Return the collectors of a source that this node serves, and those of other nodes, by name."""
        found = {name: each for name, each in self.clients.items() if each.streams and each.source == source}
        return self._owners.split(found, source)

    def holds(self, boot: int, revision: int) -> bool:
        """Return whether this is at least `revision` of the gateway that started as `boot`."""
        return self._boot == boot and not self.stale and self.revision >= revision and self.version >= 0

    def account(self) -> dict[str, int]:
        """Return the counter that tells of the registry; nothing without one."""
        return {REVISION: self.revision} if self.revision >= 0 else {}

    def _snapshot(self, envelope: Envelope, body: RegistrySnapshot) -> bool:
        if envelope.boot == self._boot and not self.stale and body.revision <= self.revision:
            return False  # meant for another late subscriber
        pieces = self._assembler.add((envelope.boot, body.revision), body)
        if pieces is None:
            return False
        self.clients = {client.name: client for piece in pieces for client in piece.clients}
        self.revision, self._boot, self.stale = body.revision, envelope.boot, False
        return True

    def _change(self, envelope: Envelope, body: RegistryChange) -> bool:
        if envelope.boot == self._boot and body.revision <= self.revision:
            return False
        if envelope.boot != self._boot or body.after != self.revision or self.stale:
            self.stale = True
            return False
        for name in body.left:
            self.clients.pop(name, None)
        self.clients.update((client.name, client) for client in body.joined)
        self.revision = body.revision
        return True
