"""A relay with every service, exporters that send numbered datagrams through it, and collectors that count them."""

import socket
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from typing import Any, Final

from shared.ledger.accounts import Accounts
from shared.ledger.counters import BUS_FULL, MISSED
from shared.net.sockets import enlarge_receive_buffer
from tests.background import Background, Reading
from tests.builders import BusEnds, accounts_when
from tests.openly import OpenStack
from tests.services.offload.site import EXPORTERS, PORT, RELAY, SIEMS, OffloadSite
from tests.stack import ask_json, wait_until
from tests.system.offload_collectors import SERVICES, open_relay
from tests.traffic import pause

PER_SECOND: Final = 200


class Exporting(Background):
    """Exporters that send datagrams in turn, numbered from `first` on, until told to stop; some come in fragments."""

    def __init__(self, site: OffloadSite, opened: ExitStack, version: int = 4, first: int = 0) -> None:
        super().__init__()
        self.sent = 0
        self.first = first
        self._to = RELAY[version], PORT
        numbers = range(len(EXPORTERS[version]))
        self._sockets = [opened.enter_context(site.exporting(number, version)) for number in numbers]

    def run(self) -> None:
        """Send evenly."""
        while not self.stopping.is_set():
            sock = self._sockets[self.sent % len(self._sockets)]
            with suppress(OSError):  # while the cable is away
                number = (self.first + self.sent).to_bytes(4)
                sock.sendto(number + bytes(3000 if self.sent % 50 == 0 else 200), self._to)
                self.sent += 1
            pause(1 / PER_SECOND)


class Counted(Reading):
    """A collector's socket, and how often each number has come."""

    def __init__(self, site: OffloadSite, address: str, port: int) -> None:
        super().__init__(site.siem.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM))
        self.came: Counter[int] = Counter()
        self.times: list[float] = []
        """Times at which copies came (time.monotonic)."""
        enlarge_receive_buffer(self.socket, 1 << 25)
        self.socket.bind((address, port))

    def take(self, payload: bytes, _peer: Any) -> None:
        """Count a copy."""
        self.came[int.from_bytes(payload[:4])] += 1
        self.times.append(time.monotonic())


class Relay:
    """All services on a relay with a journal, and one collector."""

    def __init__(self, stack: OpenStack, site: OffloadSite, bus: BusEnds, source: str) -> None:
        self.stack, self.site, self._bus = stack, site, bus
        self._terms = {"streams": ["netflow"], "address": SIEMS[4][0], "port": 9000, "source": source}
        self.sender = "forwarder.1" if source == "relay" else "transmitter.1"

    def ask(self, **request: Any) -> dict[str, Any]:
        """Ask the gateway."""
        with self.site.relay.entered():
            answer = ask_json(request)
        assert answer["ok"], answer
        return answer

    def register(self, **more: Any) -> None:
        """Sign the collector up, anew if it is there."""
        self.ask(op="register", name="siem", take_over=True, **self._terms, **more)

    def wait_level(self) -> None:
        """Wait until the collector does not catch up any more."""
        wait_until(
            lambda: "catching_up" not in self.ask(op="list")["clients"]["siem"],
            lambda: f"it is level: {self.ask(op='list')}",
        )

    def received(self) -> int:
        """Datagrams that ingest has received: the first ones."""
        return accounts_when(self._bus, "ingest.1", lambda _: True)["stream/netflow"]["received"]

    def copied(self) -> int:
        """Copies that the kernel has counted, of a collector that it serves."""
        return accounts_when(self._bus, "offload.1", lambda _: True).get("rules/siem", {}).get("copied", 0)

    def wait_for_rules(self) -> None:
        """Wait until the kernel copies for the collector."""
        before = self.copied()
        wait_until(
            lambda: self.copied() > before, lambda: f"{self.stack['offload'].text[-2000:]} {self.ask(op='list')}"
        )

    def lost_on_bus(self) -> int:
        """Datagrams that the bus has lost, as both its ends count them.

        Each is a message here, and a queue holds 2,048: a process that is kept from the CPU for long loses some.
        """
        missed = accounts_when(self._bus, self.sender, lambda told: "collector/siem" in told)["collector/siem"]
        refused = accounts_when(self._bus, "ingest.1", lambda _: True)["stream/netflow"]
        return missed.get(MISSED, 0) + refused.get(BUS_FULL, 0)

    def explain(self) -> str:
        """The facts that tell where a datagram was lost: the ledger, errors of both kernels, the log of offload."""
        errors = [
            {name: count for name, count in host.counters().items() if count and ("Err" in name or "Fail" in name)}
            for host in (self.site.relay, self.site.siem)
        ]
        return f"{self.stack.run('ledger')[1]}\n{errors}\n{self.stack['offload'].text[-2000:]}"

    def account(self, came: int) -> dict[str, int]:
        """The collector's account once it has as many copies as have come."""

        def is_whole(accounts: Accounts) -> bool:
            account = accounts.get("collector/siem", {})
            return account.get("sent", 0) + account.get("by_kernel", 0) == came

        return accounts_when(self._bus, self.sender, is_whole)["collector/siem"]


@contextmanager
def relay(stack: OpenStack, source: str) -> Iterator[tuple[Relay, Exporting, Counted]]:
    """Everything runs on the relay; the exporters and the collector are other hosts."""
    stack.configure(
        f"""
[gateway]
destinations = ["10.2.0.0/24"]
serve_seconds = 10
[[stream]]
name = "netflow"
listen = ["udp://0.0.0.0:{PORT}"]
journal = true
[journal]
directory = "{stack.directory}/journal"
min_free = 0
[offload]
interfaces = ["in"]
"""
    )
    with open_relay(stack, (*SERVICES[:-1], "journal", "offload")) as (site, opened):
        bus = opened.enter_context(BusEnds(stack.bus))
        came = opened.enter_context(closing(Counted(site, SIEMS[4][0], 9000)))
        exporting = Exporting(site, opened)
        came.start()
        opened.callback(exporting.stop)
        yield Relay(stack, site, bus, source), exporting, came
