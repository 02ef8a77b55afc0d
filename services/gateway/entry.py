"""A client's entry in the registry: who made it and how, its lease, and the event of a change."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Literal

from services.gateway.health import Condition
from services.gateway.permission import HERE, Rights
from shared.registry import Client

NOT_LOOKED_AT: Final = Condition("fresh", 0.0)

EventKind = Literal["joined", "changed", "left", "expired"]


class Origin(StrEnum):
    """How an entry was made."""

    SETTINGS = "settings"
    NAMES = "names"
    JSON = "json"


@dataclass(frozen=True, slots=True)
class Visitor:
    """Who asks: a connection by its number (0: one of an earlier start), the address and port it comes from.

    `uid` is the user at the other end of an AF_UNIX connection. Of an earlier start, the rights say the holder alone.
    """

    id: int
    address: str
    port: int
    rights: Rights = HERE
    uid: int | None = None

    def __str__(self) -> str:
        where = f"{self.address} port {self.port}" if self.uid is None else f"this host, user {self.uid}"
        return f"{where}, by {self.rights.holder!r}" if self.rights.holder else where

    def controls(self, other: "Visitor") -> bool:
        """Whether it may change what the other has signed up: it has the same holder, or every right."""
        own = self.rights.holder != "" and self.rights.holder == other.rights.holder
        return own or self.rights.everything


@dataclass(slots=True)
class Entry:
    """A client and its lease.

    `revision` is that in which the client joined; `expires_at` is infinite without `ttl`; one that is `held` lasts no
    longer than its visitor's connection. Of what was kept from an earlier start, the connection is gone.
    `condition` is how it did when somebody last looked.
    """

    client: Client
    origin: Origin
    visitor: Visitor
    ttl: float
    expires_at: float
    revision: int
    held: bool
    renewed_at: float
    condition: Condition = NOT_LOOKED_AT


@dataclass(frozen=True, slots=True)
class Event:
    """One change: `entry` is the new one, or that which has gone."""

    kind: EventKind
    revision: int
    entry: Entry
