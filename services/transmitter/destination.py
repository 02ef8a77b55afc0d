"""One collector's copies: the way there, what waits for the way to be found, and its account."""

import socket
from collections import Counter
from typing import Final

from services.transmitter.addressing import Identification, Target
from services.transmitter.headers import ETHERTYPE_IPV4, ETHERTYPE_IPV6
from services.transmitter.next_hops import Neighbourhood, Way, WayKind
from shared.client import Client
from shared.datagrams.gathered import MAX_GATHERED_PAYLOAD
from shared.fanout.backlog import Backlog, BacklogMemory
from shared.ledger import NO_NEIGHBOUR
from shared.net.netlink import NUD_FAILED

HELD_SECONDS: Final = 1.0
"""How long datagrams wait for the next hop to tell its link address."""
LONG_SECONDS: Final = 0.5
"""A next hop that has not answered for so long is not there."""
HELD_ROWS: Final = 4096
HELD_BYTES: Final = 2 * MAX_GATHERED_PAYLOAD
"""How many datagrams, and bytes of the batches that they are in, one collector may have waiting."""


class Copies:
    """How a collector is reached. `numbers` are those of its address, `permitted` is the policy's word on that.

    In `held` is what waits for the next hop.
    """

    def __init__(
        self,
        client: Client,
        account: Counter[str],
        neighbourhood: Neighbourhood,
        numbers: Identification,
        memory: BacklogMemory,
        *,
        permitted: bool,
    ) -> None:
        self.client = client
        self.account = account
        self.permitted = permitted
        self.unreachable = False
        """Whether there is no way, or the next hop does not answer, as far as datagrams have tried."""
        self.numbers = numbers
        self.version = 6 if ":" in client.address else 4
        self._packed = socket.inet_pton(socket.AF_INET6 if self.version == 6 else socket.AF_INET, client.address)
        self._neighbourhood = neighbourhood
        self._found_at = -1
        self._way = Way(WayKind.NONE)
        self._target: Target | None = None
        self._target_of: bytes | None = None
        self.held = Backlog(account, NO_NEIGHBOUR, HELD_SECONDS, HELD_ROWS, HELD_BYTES, memory)

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

    def refresh(self) -> None:
        """See whether the collector can be reached."""
        if self._found_at < 0:
            return  # nothing was ever sent to it
        way = self.way if self.unreachable else self._way  # who is well and idle costs the kernel no question
        lost = way.kind is WayKind.NONE
        if way.hop is not None and not way.hop.usable:
            lost = self.unreachable or bool(way.hop.state & NUD_FAILED) or self.held.waited_seconds >= LONG_SECONDS
        self.unreachable = lost

    def close(self) -> None:
        """Drop what still waits: the collector has gone, or has changed."""
        self.held.drop()
