"""A client's entry in the registry: its owner, its origin, its lease, and the event of a change."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Final, Literal

from services.gateway.admission.peer import Peer
from services.gateway.registry.condition import Condition
from shared.client import Client, Withheld

NOT_REFRESHED: Final = Condition("fresh", 0.0)

EventKind = Literal["joined", "changed", "left", "expired", "renewed"]
"""`renewed`, at another node than before, is no event for watchers or the bus."""


Orders = Mapping[str, Withheld | None]
"""Orders to withhold copies, by the name of the collector; None: it has ended."""
NO_ORDERS: Final[Orders] = MappingProxyType({})


class Origin(StrEnum):
    """The way in which an entry was made."""

    SETTINGS = "settings"
    NAMES = "names"
    JSON = "json"


@dataclass(slots=True)
class Entry:
    """A client and its lease.

    `revision` is that in which the client joined; `expires_at` is infinite without `ttl`. An entry that is `held` lasts
    no longer than its peer's connection. An entry kept from an earlier start has no connection any more. `proven`: its
    peer has shown that copies arrive at its address. `condition` is that of its last refresh. `host` is the name
    that the settings have in place of the address.

    Where several nodes share the registry, `home` is the node that measures the lease. The client has signed up at
    `node`, with the gateway whose boot id is `boot`. The connection of an entry that is held is with that gateway.
    """

    client: Client
    origin: Origin
    peer: Peer
    ttl: float
    expires_at: float
    revision: int
    held: bool
    renewed_at: float
    proven: bool = False
    condition: Condition = NOT_REFRESHED
    host: str = ""
    home: str = ""
    node: str = ""
    boot: int = 0


@dataclass(frozen=True, slots=True)
class Event:
    """One change: `entry` is the new entry, or the one that has gone."""

    kind: EventKind
    revision: int
    entry: Entry
