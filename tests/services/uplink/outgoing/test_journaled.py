import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.builders import BusEnds, accounts_when
from tests.services.uplink.nats import NatsServer, free_port
from tests.services.uplink.sites import Site, assert_balanced, away, exporter, flows
from tests.stack import ask_json, wait_until
from tests.traffic import CheckingCollector, payload

pytestmark = pytest.mark.usefixtures("lab")

EXPORTERS, OUTAGE_SECONDS = 16, 300
MEMORY = 'memory = 100000000\nsend = ["*"]'


def kept(stream: str, port: int) -> str:
    """Settings of a stream that comes in here, and that the journal keeps."""
    return f'[[stream]]\nname = "{stream}"\nlisten = ["udp://127.0.0.1:{port}"]\njournal = true\n'


class Exporters:
    """Exporters whose datagrams a checking collector knows; each send goes on where the one before has ended."""

    def __init__(self, port: int, largest: int) -> None:
        self.sent = 0
        self.largest = largest
        self._port = port
        self._socks = [exporter(f"127.0.0.{each + 2}") for each in range(EXPORTERS)]

    def send(self, rounds: int, pause: float = 0.004) -> None:
        """Send a datagram of each exporter, several times."""
        for _ in range(rounds):
            number = self.sent // EXPORTERS
            for each, sock in enumerate(self._socks):
                sock.sendto(payload(each, number, self.largest), ("127.0.0.1", self._port))
            self.sent += EXPORTERS
            time.sleep(pause)

    def close(self) -> None:
        """Close all sockets."""
        for sock in self._socks:
            sock.close()


class Away:
    """A site with a journal, another one that receives from it, and what goes between them."""

    def __init__(self, server: NatsServer, a: Site, b: Site, exporters: Exporters) -> None:
        self.server, self.a, self.b, self.exporters = server, a, b, exporters
        self.collector = CheckingCollector(b, "127.0.0.1", 9541, exporters.largest)
        answer = ask_json({"op": "register", "name": "c", "streams": ["flows"], "port": 9541}, b.gateway)
        assert answer["ok"], answer

    def arrived(self, seconds: float = 60) -> None:
        """Wait until all that was sent has arrived, once, whole and in order; the accounts say the same."""
        sent = self.exporters.sent
        wait_until(
            lambda: self.collector.received >= sent,
            lambda: f"{self.collector.received} of {sent}, {self._ledgers()}",
            seconds,
        )
        found = self.sending(lambda account: account["acknowledged"] == account["taken"])
        assert (self.collector.received, self.collector.wrong) == (sent, 0)
        assert (found["taken"], found["held"]) == (sent, 0)
        assert_balanced(self.a, self.b)

    def _ledgers(self) -> str:
        return "".join(text for site in (self.a, self.b) for text in map(str, site.run("ledger")))

    def sending(self, condition: Callable[[dict[str, int]], bool]) -> dict[str, int]:
        """The account of what is sent, once it is so."""
        with BusEnds(self.a.bus) as bus:
            return accounts_when(bus, "uplink.1", lambda found: condition(found["sending/flows"]))["sending/flows"]


@pytest.fixture
def between(tmp_path: Path, largest: int) -> Iterator[Away]:
    """Two sites, one of them with a journal, and a server."""
    port = free_port()
    journal = f'[journal]\ndirectory = "{tmp_path}/journal"\nbytes = 8589934592\nmemory = 17179869184\n'
    patient = "high_water_mark = 16384"  # for a journal that a busy machine holds up
    with (
        NatsServer(tmp_path) as server,
        Site(tmp_path / "a", "a", server, kept("flows", port), MEMORY, journal, patient) as a,
        Site(tmp_path / "b", "b", server, away("flows"), 'receive = ["a/flows"]') as b,
        closing(Exporters(port, largest)) as exporters,
    ):
        a.begin("broker", "gateway", "journal", "ingest", "forwarder", "uplink")
        wait_until(lambda: "made the stream" in a.uplink.text, "there is a stream")
        b.begin()
        flows(b)
        made = Away(server, a, b, exporters)
        yield made
        del made.collector  # its counters are a file that is mapped


@pytest.mark.parametrize("largest", [60_000])
def test_an_outage_costs_nothing_that_the_journal_has(between: Away) -> None:
    """While no server can be reached more comes than may wait; afterwards all of it arrives, once and in order.

    A SIGKILL of the uplink, a restart of it, and one of ingest in the meantime change nothing.
    """
    send = between.exporters.send
    send(50)
    between.arrived()
    between.server.stop(signal.SIGKILL)
    while "wait in the journal" not in between.a.uplink.text:
        send(50)
    send(100)
    between.a.uplink.stop(signal.SIGKILL)
    send(50)
    between.a.start("uplink")
    send(50)
    assert between.a.uplink.stop() == 0
    between.a.start("uplink")
    assert between.a["ingest"].stop() == 0
    between.a.start("ingest")
    send(50)
    owed = between.sending(lambda account: account["held"] > 100 * EXPORTERS)
    assert owed["acknowledged"] + owed["held"] == owed["taken"]
    between.server.start()
    send(100)
    between.arrived()
    send(50)
    between.arrived()
    between.a.uplink.wait_for("what other sites are to have has been read from the journal")


@pytest.mark.soak
@pytest.mark.timeout(3 * OUTAGE_SECONDS)
@pytest.mark.parametrize("largest", [9_000])
def test_an_outage_of_minutes_costs_nothing(between: Away) -> None:
    """After five minutes without a server all that came meanwhile arrives, once and in order; memory stays bounded."""
    send = between.exporters.send
    send(50)
    between.arrived()
    between.server.stop(signal.SIGKILL)
    until = time.monotonic() + OUTAGE_SECONDS
    while time.monotonic() < until:
        send(50)
    between.server.start()
    send(50)
    between.arrived(seconds=OUTAGE_SECONDS)
    assert between.a.uplink.resident_mb("VmHWM") < 150
