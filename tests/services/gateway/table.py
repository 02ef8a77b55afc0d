"""A registry with a clock that the test sets, asked as clients ask: what they may not do is refused."""

import errno
from collections.abc import Sequence
from typing import Final

import pytest

from services.gateway.admission.ownership import check_changeable, check_replaceable, check_room
from services.gateway.admission.peer import Peer
from services.gateway.admission.rights import Rights
from services.gateway.protocol.requests import RequestError
from services.gateway.registry.changes import Keep, keep_nothing
from services.gateway.registry.entry import Entry, Event, Origin
from services.gateway.registry.registry import Registry
from shared.client import Client, Source
from shared.settings.tables import Gateway

HERE: Final = Peer(1, "127.0.0.1", 4000)
ELSEWHERE: Final = Peer(2, "192.0.2.7", 4001, Rights("siem", frozenset({"collect"})))


class Disk:
    """Keeps the kinds of the events of each change; while it is full it can't write, and tells so."""

    def __init__(self) -> None:
        self.full = False
        self.kept: list[list[str]] = []

    def keep(self, events: Sequence[Event], *_: object, **__: object) -> None:
        """Write a change, or fail to."""
        self.kept.append([event.kind for event in events])
        if self.full:
            raise OSError(errno.ENOSPC, "no space")


class Table(Registry):
    """The registry, at time 0."""

    def __init__(
        self,
        max_clients: int = 1000,
        keep: Keep = keep_nothing,
        preserve_seconds: float = 0.0,
        max_clients_per_holder: int = 1000,
    ) -> None:
        self.now = 0.0
        self._limits = Gateway(max_clients=max_clients, max_clients_per_holder=max_clients_per_holder)
        super().__init__(lambda: self.now, 1, keep, preserve_seconds)

    def join(
        self,
        name: str,
        peer: Peer = HERE,
        origin: Origin = Origin.JSON,
        *,
        ttl: float = 0.0,
        hold: bool = False,
        take_over: bool = False,
    ) -> Entry:
        """Enter a name."""
        present = self.find(name)
        if present is not None:
            check_replaceable(present, peer, origin, take_over=take_over)
        check_room(self, peer.rights.holder, self._limits, present)
        return self.grant(Client(name, 0, peer.address, peer.port), peer, origin, ttl=ttl, hold=hold)

    def collect(self, name: str, source: Source = "relay") -> Entry:
        """Enter a collector."""
        client = Client(name, 0, "127.0.0.1", 9, streams=("messages",), source=source)
        return self.grant(client, HERE, Origin.JSON)

    def renew_as(self, name: str, generation: int, peer: Peer) -> None:
        """Renew an entry."""
        self.renew(check_changeable(self.find(name), name, generation, peer))

    def release_as(self, name: str, generation: int, peer: Peer) -> None:
        """Take an entry away."""
        self.release(check_changeable(self.find(name), name, generation, peer))

    @property
    def present(self) -> list[str]:
        """The names that are there."""
        return [entry.client.name for entry in self.entries()]


def error_of(action: object, *arguments: object, **options: object) -> str:
    """The error word that an action is refused with."""
    with pytest.raises(RequestError) as caught:
        action(*arguments, **options)  # type: ignore[operator]
    return caught.value.error
