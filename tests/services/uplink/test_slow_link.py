import time
from contextlib import closing
from pathlib import Path

from tests.builders import BusEnds, accounts_when
from tests.network import HERE, End, Host
from tests.services.uplink.nats import NatsServer, free_port
from tests.services.uplink.sites import Site, away, exporter, flows, home
from tests.slow_link import slow_link
from tests.stack import wait_until

BITS_PER_SECOND, DELAY = 10e6, 0.04
WASTE = 1.2
"""Bytes that the link carries for each of a payload, at most: headers, and what JetStream tells."""
SIZE, SECONDS = 1200, 4
SERVER, FAR = "10.8.0.1", "10.8.0.2"


def overload(port: int) -> int:
    """Send twice what the link carries; return the number of datagrams."""
    sent, rate, began = 0, 2 * BITS_PER_SECOND / 8 / SIZE, time.monotonic()
    with closing(exporter("127.0.0.7")) as sock:
        while (elapsed := time.monotonic() - began) < SECONDS:
            for number in range(sent, int(elapsed * rate)):
                sock.sendto(number.to_bytes(4).ljust(SIZE, b"."), ("127.0.0.1", port))
            sent = max(sent, int(elapsed * rate))
            time.sleep(0.002)
    return sent


def test_a_site_behind_a_slow_link_gets_what_it_carries(lab: None, tmp_path: Path) -> None:
    """Behind 10 Mbit/s and 80 ms a site falls behind while twice as much is sent, and says so; then it gets the rest.

    The link carries hardly more than the payloads, though they are late: nothing is asked for twice. Memory stays below
    its ceiling on both sides, and nothing is lost or comes twice.
    """
    port, more = free_port(), "plain_beyond_loopback = true"
    with (
        Host() as far,
        slow_link(
            End(HERE, "slow", f"{SERVER} 10.8.0.2"), End(far, "slow", f"10.8.0.2 {SERVER}"), BITS_PER_SECOND, DELAY
        ) as carried,
        NatsServer(tmp_path, host=SERVER) as server,
        Site(tmp_path / "a", "a", server, home("flows", port), f'send = ["flows"]\n{more}') as a,
        Site(tmp_path / "b", "b", server, away("flows"), f'receive = ["a/flows"]\nmemory = 100000000\n{more}') as b,
    ):
        a.begin("broker", "ingest", "uplink")
        wait_until(lambda: "made the stream" in a.uplink.text, "there is a stream")
        with far.entered():
            b.begin()
            flows(b)
            collector = b.sign_up("flows", 9551)
        with closing(collector), BusEnds(b.bus) as bus:
            sent = overload(port)
            behind = accounts_when(bus, "uplink.1", lambda found: found["receiving/a"].get("late_ms", 0) > 1000)
            assert behind["receiving/a"]["waiting_messages"] > 0
            _, told, _ = b.run("doctor")
            assert "s late, and" in told, told
            _, told, _ = b.run("ledger")
            assert "messages waiting   seconds late" in told, told
            wait_until(lambda: received(bus) == sent, lambda: f"{received(bus)} of {sent}")
            found = accounts_when(bus, "uplink.1", lambda found: not found["receiving/a"]["waiting_messages"])
            assert carried() < WASTE * sent * SIZE, f"{carried() / (sent * SIZE):.2f} times"
        (arrived,) = (account for name, account in found.items() if name.startswith("arriving/"))
        assert (arrived["taken"], arrived["missed"], arrived["repeated"]) == (sent, 0, 0)
        for site, ceiling in ((a, 403), (b, 100)):
            assert site.uplink.resident_mb("VmHWM") < ceiling


def received(bus: BusEnds) -> int:
    """Datagrams of other sites on the bus."""
    return accounts_when(bus, "uplink.1", lambda found: "stream/flows" in found)["stream/flows"]["received"]
