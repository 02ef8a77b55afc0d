"""One collector's copies: the way there, what waits for the way to be found, and its account."""

import socket
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from services.transmitter.headers import ETHERTYPE_IPV4, ETHERTYPE_IPV6
from services.transmitter.neighbourhood import Neighbourhood, Way, WayKind
from services.transmitter.target import Identification, Target
from shared.batch import Indices
from shared.gathering import MAX_GATHERED_PAYLOAD, Gathered
from shared.ledger import HELD, NO_NEIGHBOUR
from shared.registry import Client

HELD_SECONDS: Final = 1.0
"""How long datagrams wait for the next hop to tell its link address."""
HELD_ROWS: Final = 4096
HELD_BYTES: Final = 2 * MAX_GATHERED_PAYLOAD
"""How many datagrams, and bytes of the batches that they are in, one collector may have waiting."""


@dataclass(frozen=True, slots=True)
class Held:
    """Rows of a batch (None: all) that wait, until when."""

    batch: Gathered
    rows: Indices | None
    expires_at: float

    @property
    def count(self) -> int:
        """How many rows."""
        return len(self.batch) if self.rows is None else len(self.rows)


class Copies:
    """How a collector is reached. `numbers` are those of its address, `permitted` is the policy's word on that."""

    def __init__(
        self,
        client: Client,
        account: Counter[str],
        neighbourhood: Neighbourhood,
        numbers: Identification,
        *,
        permitted: bool,
    ) -> None:
        self.client = client
        self.account = account
        self.permitted = permitted
        self.numbers = numbers
        self.version = 6 if ":" in client.address else 4
        self._packed = socket.inet_pton(socket.AF_INET6 if self.version == 6 else socket.AF_INET, client.address)
        self._neighbourhood = neighbourhood
        self._found_at = -1
        self._way = Way(WayKind.NONE)
        self._target: Target | None = None
        self._target_of: bytes | None = None
        self._held: deque[Held] = deque()
        self._held_bytes = 0

    @property
    def way(self) -> Way:
        """The way there as of now."""
        if self._found_at != self._neighbourhood.version:
            self._way = self._neighbourhood.way(self.client.address)
            self._found_at = self._neighbourhood.version
            self._target = None
        return self._way

    def target(self, way: Way) -> Target:
        """What frames or packets that go that way are addressed with."""
        hop_address = way.hop.link_address if way.hop else b""
        if self._target is None or self._target_of != hop_address:
            ethertype = ETHERTYPE_IPV4 if self.version == 4 else ETHERTYPE_IPV6
            framed = way.hop is not None and way.link is not None
            self._target = Target(
                self.version,
                self._packed,
                self.client.port,
                self.client.hop_limit,
                self.client.dscp,
                way.link.index if way.link else 0,
                hop_address + way.link.address + ethertype.to_bytes(2) if framed and way.link else b"",
            )
            self._target_of = hop_address
        return self._target

    def must_wait(self, way: Way) -> bool:
        """Whether the next hop's link address has to be found out first; has it found out."""
        if way.hop is None:
            return False
        way.hop.used = True
        if way.hop.usable:
            return False
        self._neighbourhood.resolve(way.hop)
        return True

    def hold(self, batch: Gathered, rows: Indices | None) -> None:
        """Keep rows until the next hop is known; beyond the bounds the oldest are dropped for them."""
        held = Held(batch, rows, time.monotonic() + HELD_SECONDS)
        self._held.append(held)
        self.account[HELD] += held.count
        self._held_bytes += batch.payload_bytes
        while self.account[HELD] > HELD_ROWS or self._held_bytes > HELD_BYTES:
            self._drop_oldest()

    @property
    def holds(self) -> bool:
        """Whether anything waits."""
        return bool(self._held)

    def release(self) -> Iterator[Held]:
        """Yield what waits, oldest first, and hold it no longer."""
        while self._held:
            yield self._take_oldest()

    def expire(self, now: float) -> None:
        """Drop what has waited too long."""
        while self._held and self._held[0].expires_at <= now:
            self._drop_oldest()

    def drop_held(self, cause: str = NO_NEIGHBOUR) -> None:
        """Drop all that waits, under a cause."""
        for held in self.release():
            self.account[cause] += held.count

    def _drop_oldest(self) -> None:
        self.account[NO_NEIGHBOUR] += self._take_oldest().count

    def _take_oldest(self) -> Held:
        held = self._held.popleft()
        self.account[HELD] -= held.count
        self._held_bytes -= held.batch.payload_bytes
        return held

    def refresh(self) -> None:
        """Nothing to learn each second: the neighbourhood follows what changes."""

    def close(self) -> None:
        """Drop what still waits: the collector has gone, or has changed."""
        self.drop_held()
