"""One collector's copies: the way there, datagrams that wait until the way is found, and its account."""

import socket
from collections import Counter
from typing import Final

from services.transmitter.packets.addressing import Addressing, Identification
from services.transmitter.packets.headers import ETHERTYPE_IPV4, ETHERTYPE_IPV6
from shared.client import MOST_WAITING, Client
from shared.datagrams.gathered import MAX_GATHERED_PAYLOAD
from shared.fanout.sending.backlog import Backlog, BacklogMemory
from shared.fanout.sending.next_hops import Egress, EgressKind, NextHops
from shared.fanout.sending.send_errors import SaidErrors
from shared.ledger.counters import NO_NEIGHBOUR
from shared.net.netlink import NUD_FAILED

HELD_SECONDS: Final = 1.0
"""Time that datagrams wait for the next hop to tell its link address."""
LONG_SECONDS: Final = 0.5
"""A next hop that has not answered for this long is not there."""
HELD_BYTES: Final = 2 * MAX_GATHERED_PAYLOAD
"""Bytes of the batches that what waits for one collector is in."""


class Destination:
    """A collector and the way to it. `numbers` are those of its address; `permitted` is the policy's decision on that.

    `held` has the datagrams that wait for the next hop.
    """

    def __init__(
        self,
        client: Client,
        account: Counter[str],
        next_hops: NextHops,
        numbers: Identification,
        memory: BacklogMemory,
        *,
        permitted: bool,
    ) -> None:
        self.client = client
        self.account = account
        self.permitted = permitted
        self.said = SaidErrors(client.name)
        self.unreachable = False
        """True if there is no way, or the next hop does not answer, as far as datagrams have tried."""
        self.numbers = numbers
        self.version = 6 if ":" in client.address else 4
        self._packed = socket.inet_pton(socket.AF_INET6 if self.version == 6 else socket.AF_INET, client.address)
        self._next_hops = next_hops
        self._found_at = -1
        self._egress = Egress(EgressKind.NONE)
        self._addressing: Addressing | None = None
        self._addressing_of: bytes | None = None
        self.held = Backlog(account, NO_NEIGHBOUR, HELD_SECONDS, MOST_WAITING["original"], HELD_BYTES, memory)

    def adopt(self, client: Client) -> None:
        """Serve another entry of the same address and port from now on, with its hop limit and DSCP."""
        self.client = client
        self._addressing = None

    @property
    def egress(self) -> Egress:
        """The way there as of now."""
        if self._found_at != self._next_hops.version:
            self._egress = self._next_hops.egress_to(self.client.address)
            self._found_at = self._next_hops.version
            self._addressing = None
        return self._egress

    def addressing(self, egress: Egress) -> Addressing:
        """Return the addressing of frames or packets that go that way."""
        hop_address = egress.hop.link_address if egress.hop else b""
        if self._addressing is None or self._addressing_of != hop_address:
            ethertype = ETHERTYPE_IPV4 if self.version == 4 else ETHERTYPE_IPV6
            framed = egress.hop is not None and egress.link is not None
            self._addressing = Addressing(
                self.version,
                self._packed,
                self.client.port,
                self.client.hop_limit,
                self.client.dscp,
                egress.link.index if egress.link else 0,
                hop_address + egress.link.address + ethertype.to_bytes(2) if framed and egress.link else b"",
            )
            self._addressing_of = hop_address
        return self._addressing

    def must_wait(self, egress: Egress) -> bool:
        """Return whether the next hop's link address has to be found out first; if so, start that."""
        if egress.hop is None:
            return False
        egress.hop.used = True
        if egress.hop.usable:
            return False
        self._next_hops.resolve(egress.hop)
        return True

    def refresh(self) -> None:
        """Check whether the collector can be reached."""
        if self._found_at < 0:
            return  # nothing was ever sent to it
        egress = self.egress if self.unreachable else self._egress  # a healthy, idle one costs no question
        lost = egress.kind is EgressKind.NONE
        if egress.hop is not None and not egress.hop.usable:
            lost = self.unreachable or bool(egress.hop.state & NUD_FAILED) or self.held.waited_seconds >= LONG_SECONDS
        self.unreachable = lost

    def read_errors(self) -> None:
        """Do nothing: errors go to the exporter whose address the copies have."""

    def seek(self) -> None:
        """Ask the next hop for its link address, if it is not known."""
        self.must_wait(self.egress)
        self.refresh()

    def close(self) -> None:
        """Drop datagrams that still wait: the collector has gone, or has moved."""
        self.held.drop()
