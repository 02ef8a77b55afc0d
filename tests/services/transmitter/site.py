"""A relay with a sender of copies, without a bus, and a collector's host at the other end of a link."""

import socket
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from typing import Any

from services.transmitter.destination import Destination
from services.transmitter.opener import open_socket
from services.transmitter.privileges import KINDS, RawSockets
from services.transmitter.sender import Sender
from shared.datagrams.gathered import Gathered
from shared.datagrams.routing import ALL_ROWS
from shared.fanout.sending.backlog import BacklogMemory
from shared.fanout.sending.next_hops import DISCARD_PORT
from shared.ledger.counters import EXPECTED
from shared.ledger.equations import discrepancies
from shared.settings.model import Settings
from shared.settings.tables import Transmitter
from tests.builders import make_batch, make_client
from tests.capture import Arrival, Capture, Datagram
from tests.network import End, Host, veth
from tests.stack import wait_until

EXPORTERS = ("192.0.2.1", "192.0.2.2")
SEND_BUFFER = 100_000
SIEM4, SIEM6 = "10.2.0.2", "fd00:2::2"


def ask_quickly(host: Host, interface: str) -> None:
    """Let a host's kernel doubt neighbours, and ask for them, 20 times a second instead of once (arp(7))."""
    for table in ("arp_cache", "ndisc_cache"):
        tuning = "delay_probe 50 retrans 50 ucast_probes 1 mcast_probes 20"
        host.run(*f"ip ntable change name {table} dev {interface} {tuning}".split())


def open_raw(opened: ExitStack, host: Host, each: int = 3) -> RawSockets:
    """Open sockets of each kind as the opener leaves them, but with small buffers, which a test has to fill."""
    with host.entered():
        kept = [tuple(opened.enter_context(open_socket(kind)) for _ in range(each)) for kind in KINDS]
    for sock in (sock for several in kept for sock in several):
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
    packet, ip4, ip6 = kept
    return RawSockets(packet, ip4, ip6)


class Site:
    """A relay, whose interface is `up`, and a collector's host, whose interface is `eth`; `settings` are the policy."""

    def __init__(self, opened: ExitStack, **settings: Any) -> None:
        self.relay, self.siem = opened.enter_context(Host()), opened.enter_context(Host())
        self.up = End(self.relay, "up", "10.2.0.1/24 fd00:2::1/64")
        self.eth = End(self.siem, "eth", f"{SIEM4}/24 {SIEM6}/64")
        opened.enter_context(veth(self.up, self.eth))
        ask_quickly(self.relay, "up")
        raw = open_raw(opened, self.relay)
        own = Transmitter(**settings)
        held = BacklogMemory(own.held_memory)
        with self.relay.entered():
            self.sender = opened.enter_context(closing(Sender(Settings(transmitter=own), raw, held)))
        self.account: Counter[str] = Counter()
        self.destination: Destination = self.reach()

    def reach(self, address: str = SIEM4, port: int = 9514, **fields: Any) -> Destination:
        """Return the way to a collector."""
        return self.sender.reach(make_client("c", port, address=address, **fields), self.account)

    def send(self, *payloads: bytes, sources: Sequence[str] = EXPORTERS, port: int = 514) -> None:
        """Send copies of a batch; the account adds up afterwards."""
        batch = Gathered([make_batch(payloads, sources, port=port)])
        self.account["offered"] += len(payloads)
        self.sender.send(batch, [(self.destination, ALL_ROWS)])
        self.check()

    def check(self) -> None:
        """The account must add up at any time."""
        account = {**self.account, EXPECTED: self.account["offered"]}
        assert list(discrepancies({"collector/c": account})) == []

    def turn(self) -> None:
        """Do one turn of the loop."""
        self.sender.work()
        self.check()

    def turn_until(self, counter: str, count: int) -> None:
        """Turn until so many are counted."""

        def counted() -> bool:
            self.turn()
            return self.account[counter] >= count

        wait_until(counted, lambda: f"{count} are {counter}: {dict(self.account)}")

    def until_delivered(self) -> None:
        """Send until the way is known and nothing waits."""
        self.send(b"first")
        self.turn_until("sent", self.account["offered"])

    def send_until(self, condition: Callable[[], object], what: str) -> None:
        """Send a datagram at a time, and turn, until a condition is met."""

        def met() -> object:
            self.send(b"again")
            self.turn()
            return condition()

        wait_until(met, what)


class Copied(Capture):
    """The copies that come in at an interface, however many: a plain user's sockets hold only some hundreds."""

    def take(self) -> Iterator[Datagram]:
        """Take those to a collector's port, and let pass what is asked of next hops."""
        return (datagram for datagram in super().take() if datagram.port != DISCARD_PORT)


def payloads(arrivals: Iterable[Arrival]) -> list[bytes]:
    """Return the payloads that arrived."""
    return [arrival.payload for arrival in arrivals]


def numbered(start: int, count: int) -> list[bytes]:
    """Payloads that can be told apart."""
    return [b"%06d" % number for number in range(start, start + count)]
