"""The copy of the registry that a subscriber keeps: a snapshot in pieces, then numbered changes."""

from shared.bus.messages import Envelope, RegistryChange, RegistrySnapshot
from shared.client import Client


class RegistryReplica:
    """Follows the gateway; `stale` says that a change is missing and a new snapshot has to be asked for.

    `version` grows with every change, whichever gateway it came from; `revision` is the present gateway's own.
    """

    def __init__(self) -> None:
        self.clients: dict[str, Client] = {}
        self.revision = self.version = -1
        self.stale = False
        self._boot = -1
        self._pieces: list[RegistrySnapshot] = []
        self._pieces_of = (-1, -1)

    def apply_message(self, envelope: Envelope, body: RegistrySnapshot | RegistryChange) -> bool:
        """Take a message in; return whether it changed the registry."""
        changed = self._change(envelope, body) if isinstance(body, RegistryChange) else self._snapshot(envelope, body)
        self.version += changed
        return changed

    def holds(self, boot: int, revision: int) -> bool:
        """Whether this is at least `revision` of the gateway that started as `boot`."""
        return self._boot == boot and not self.stale and self.revision >= revision

    def _snapshot(self, envelope: Envelope, body: RegistrySnapshot) -> bool:
        if envelope.boot == self._boot and not self.stale and body.revision <= self.revision:
            return False  # meant for another late subscriber
        if body.piece == 0:
            self._pieces, self._pieces_of = [], (envelope.boot, body.revision)
        if body.piece != len(self._pieces) or self._pieces_of != (envelope.boot, body.revision):
            return False  # a piece was lost: still stale, and the next snapshot begins anew
        self._pieces.append(body)
        if len(self._pieces) < body.pieces:
            return False
        self.clients = {client.name: client for piece in self._pieces for client in piece.clients}
        self.revision, self._boot, self.stale = body.revision, envelope.boot, False
        self._pieces = []
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
