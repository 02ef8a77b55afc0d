"""A client's entry in the registry: its owner, how it was made, its lease, and the event of a change."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Literal

from services.gateway.admission.peer import Peer
from services.gateway.registry.condition import Condition
from shared.client import Client

NOT_REFRESHED: Final = Condition("fresh", 0.0)

EventKind = Literal["joined", "changed", "left", "expired"]


class Origin(StrEnum):
    """How an entry was made."""

    SETTINGS = "settings"
    NAMES = "names"
    JSON = "json"


@dataclass(slots=True)
class Entry:
    """A client and its lease.

    `revision` is that in which the client joined; `expires_at` is infinite without `ttl`; one that is `held` lasts no
    longer than its peer's connection. Of what was kept from an earlier start, the connection is gone.
    `condition` is that of its last refresh.
    """

    client: Client
    origin: Origin
    peer: Peer
    ttl: float
    expires_at: float
    revision: int
    held: bool
    renewed_at: float
    condition: Condition = NOT_REFRESHED


@dataclass(frozen=True, slots=True)
class Event:
    """One change: `entry` is the new one, or that which has gone."""

    kind: EventKind
    revision: int
    entry: Entry
