"""Sessions of the nodes' gateways: which are live, and so which node measures the lease of an entry. No I/O."""

from dataclasses import dataclass
from typing import Final

from services.gateway.cluster.records import Session
from services.gateway.registry.entry import Entry

SESSION_SECONDS: Final = 15.0
"""Time without a record after which another node ends a session: JetStream needs up to 9 s for a new leader."""


@dataclass(slots=True)
class Known:
    """The last record of a session, its position in the log, and when it came."""

    record: Session
    position: int
    heard_at: float


class Sessions:
    """The sessions in the log, as seen by the gateway of node `own` that started as `boot`."""

    def __init__(self, own: str, boot: int) -> None:
        self.own = own
        self.boot = boot
        self.known: dict[str, Known] = {}

    def note(self, record: Session, position: int, now: float) -> bool:
        """Note a record; return whether another session is live now, or one is not any more."""
        before = self.known.get(record.node)
        self.known[record.node] = Known(record, position, now)
        return before is None or (before.record.boot, before.record.live) != (record.boot, record.live)

    def move(self, node: str, position: int) -> None:
        """Note that something else stands at a position in place of a node's record; the next one replaces that."""
        known = self.known.setdefault(node, Known(Session(node=node, boot=0, count=0, live=False), position, 0.0))
        known.position = position

    def forget(self, node: str) -> None:
        """Forget a node whose record the bucket has no longer."""
        self.known.pop(node, None)

    @property
    def position(self) -> int:
        """The position of this node's last record; 0: it has none."""
        return self.known[self.own].position if self.own in self.known else 0

    @property
    def member(self) -> bool:
        """True while the session of this gateway is live, as far as it knows."""
        return self.is_live(self.own, self.boot)

    @property
    def usurper(self) -> Known | None:
        """The live session of another gateway with this node's name."""
        known = self.known.get(self.own)
        return known if known and known.record.live and known.record.boot != self.boot else None

    def live(self) -> list[str]:
        """Return the nodes with a live session, by name."""
        return sorted(node for node, known in self.known.items() if known.record.live)

    def is_live(self, node: str, boot: int) -> bool:
        """Return whether the gateway of a node that started as `boot` has a live session."""
        known = self.known.get(node)
        return known is not None and known.record.live and known.record.boot == boot

    def measures(self, entry: Entry) -> bool:
        """Return whether this node measures an entry's lease: it is its home, or the first node where that is gone."""
        if not self.member:
            return False
        live = self.live()
        return (entry.home if entry.home in live else live[0]) == self.own

    def overdue(self, now: float) -> list[Known]:
        """Return the live sessions of others that have not been written for too long."""
        return [
            known
            for node, known in self.known.items()
            if (node != self.own or known.record.boot != self.boot)
            and known.record.live
            and now >= known.heard_at + SESSION_SECONDS
        ]

    def hear_anew(self, now: float) -> None:
        """Give all sessions their whole time from now on, after a time in which this gateway could hear nobody."""
        for known in self.known.values():
            known.heard_at = now
