import itertools
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from shared.ledger.equations import discrepancies
from tests.builders import BusEnds, accounts_when
from tests.services.uplink.nats import NatsServer, free_port
from tests.services.uplink.sites import Site, away, exporter, flows, home
from tests.stack import sign_up, wait_until
from tests.traffic import CheckingCollector, payload

EXPORTERS, LARGEST, KILLS = 8, 9000, 20


class Load:
    """Exporters that send at a steady rate until they are told to stop."""

    def __init__(self, port: int) -> None:
        self.sent = 0
        self._port = port
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        with ExitStack() as stack:
            socks = [stack.enter_context(closing(exporter(f"127.0.0.{each + 2}"))) for each in range(EXPORTERS)]
            for number in itertools.count():
                if self._stopped.is_set():
                    return
                for each, sock in enumerate(socks):
                    sock.sendto(payload(each, number, LARGEST), ("127.0.0.1", self._port))
                    self.sent += 1
                time.sleep(0.004)

    def __enter__(self) -> "Load":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()


@pytest.fixture
def sites(lab: None, tmp_path: Path) -> Iterator[tuple[NatsServer, Site, Site, int]]:
    """A server and two sites, of which one sends to the other."""
    with NatsServer(tmp_path) as server:
        port = free_port()
        with (
            Site(tmp_path / "a", "a", server, home("flows", port), 'send = ["flows"]') as a,
            Site(tmp_path / "b", "b", server, away("flows"), 'receive = ["a/flows"]') as b,
        ):
            a.begin()
            wait_until(lambda: "made the stream" in a.uplink.text, "there is a stream")
            b.begin()
            flows(b)
            yield server, a, b, port


@pytest.mark.soak
def test_kills_and_restarts_under_load(sites: tuple[NatsServer, Site, Site, int]) -> None:
    """Each datagram arrives once, in order and whole, while server and uplinks end and begin again and again."""
    server, a, b, port = sites
    collector = CheckingCollector(b, "127.0.0.1", 9531, LARGEST)
    sign_up({"name": "c", "streams": ["flows"], "port": 9531}, b.gateway)
    with Load(port) as load:
        for round_number in range(KILLS):
            before = collector.received
            wait_until(lambda before=before: collector.received > before + 500, "datagrams arrive")  # type: ignore[misc]
            match round_number % 4:
                case 0 | 2:
                    server.stop(signal.SIGKILL)
                    time.sleep(round_number / 40)
                    server.start()
                case 1:
                    assert a.uplink.stop() == 0
                    a.start("uplink")
                case 3:
                    assert b.uplink.stop() == 0
                    b.start("uplink")
    wait_until(lambda: collector.received >= load.sent, lambda: f"{collector.received} of {load.sent} have arrived")
    assert (collector.received, collector.wrong) == (load.sent, 0)
    for site in (a, b):
        with BusEnds(site.bus) as bus:
            accounts = accounts_when(bus, "uplink.1", lambda accounts: accounts["uplink"]["connected"])
        assert not list(discrepancies(accounts))
        code, text, _ = site.run("ledger")
        assert (code, text.splitlines()[-1]) == (0, "balanced"), text
    lost = sum(account.get("missed", 0) for name, account in accounts.items() if name.startswith("arriving/"))
    assert lost == 0
