"""One collector's trouble costs the others nothing, and is counted to the datagram."""

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from math import inf

import pytest

from shared.client import Source
from shared.ledger.accounts import Accounts
from tests.builders import BusEnds, accounts_when
from tests.capture import Arrival, Collector
from tests.network import Host
from tests.openly import OpenStack
from tests.stack import flows_to, wait_until
from tests.system.test_source_preserving import EXPORTERS, SETTINGS, Exporters, Flood, number_of, small_site

LIVE, REFUSING, DEAF = 9514, 9, 9515
RATE = 10_000
AHEAD = 4000
"""Datagrams that fit in the buffer of a plain user, should a busy machine let nobody read for a while."""
TBF = ("tbf", "rate", "2mbit", "burst", "70000", "limit", "90000")
"""An interface's queue for less than is sent: see tc-tbf(8)."""


def troubled(source: Source) -> str:
    """Settings: a live collector, four that no ARP finds, one whose port is closed, one that never reads."""
    places = {"live": ("10.2.0.2", LIVE), "refusing": ("10.2.0.2", REFUSING), "deaf": ("10.2.0.2", DEAF)}
    places |= {f"dead{number}": (f"10.2.0.{60 + number}", 9) for number in range(4)}
    return SETTINGS + "".join(
        f'[[collector]]\nname = "{name}"\nstreams = ["*"]\naddress = "{address}"\nport = {port}\nsource = "{source}"\n'
        for name, (address, port) in places.items()
    )


@contextmanager
def deaf(host: Host) -> Iterator[None]:
    """A collector that is there and never reads."""
    with closing(host.socket(socket.AF_INET, socket.SOCK_DGRAM)) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.bind(("10.2.0.2", DEAF))
        yield


def flood(exporters: Exporters, live: Collector, seconds: float, ahead: float = inf) -> tuple[list[Arrival], int]:
    """Send at 10,000/s for some seconds; return what came to the live collector, and how many were sent.

    At most `ahead` are sent that have not come yet.
    """
    arrived: list[Arrival] = []
    running = Flood(exporters, RATE, lambda sent: sent < len(arrived) + ahead)
    running.start()
    while running.sent < RATE * seconds:
        arrived += live.take()
        time.sleep(0.001)
    count = running.stop()
    quiet_at = time.monotonic() + 1
    while len(arrived) < count and time.monotonic() < quiet_at:
        if came := list(live.take()):
            arrived += came
            quiet_at = time.monotonic() + 1
        time.sleep(0.01)
    return arrived, count


def by_exporter(numbers: list[int]) -> list[list[int]]:
    """Numbers of the flood, in the order they came, exporter by exporter."""
    return [[number for number in numbers if number % len(EXPORTERS) == each] for each in range(len(EXPORTERS))]


def by_collector(accounts: Accounts) -> Accounts:
    """The accounts of collectors, by their names."""
    return {name.removeprefix("collector/"): each for name, each in accounts.items() if name.startswith("collector/")}


@pytest.mark.parametrize("source", ["relay", "original"])
@pytest.mark.parametrize("seconds", [2, pytest.param(8, marks=pytest.mark.soak)])
def test_trouble_of_others_costs_a_live_collector_nothing(open_stack: OpenStack, source: Source, seconds: int) -> None:
    """Beside dead, refusing and deaf collectors a live one gets all of 10,000/s in order; theirs are all counted."""
    with ExitStack() as opened:
        field, relay, siem = opened.enter_context(small_site(open_stack))
        siem.run("sysctl", "-q", "-w", "net.ipv4.icmp_ratemask=0")  # it tells of each that it refuses, icmp(7)
        live = opened.enter_context(Collector(siem, "10.2.0.2", LIVE))
        opened.enter_context(deaf(siem))
        open_stack.configure(troubled(source))
        with relay.entered():
            open_stack["gateway"].stop()
            open_stack.start("gateway")
            open_stack.start("transmitter")
            wait_until(lambda: flows_to("live"), "copies flow")
        service = "forwarder.1" if source == "relay" else "transmitter.1"
        bus = opened.enter_context(BusEnds(open_stack.bus))
        accounts_when(bus, service, lambda found: len(by_collector(found)) == 7)
        with Exporters(field, EXPORTERS, "10.1.0.1") as exporters:
            arrived, count = flood(exporters, live, seconds, AHEAD)

        def all_counted(found: Accounts) -> bool:
            accounts = by_collector(found)
            told = source == "original" or accounts["refusing"].get("refusals", 0) > 0
            return told and all(each["offered"] == count and not each.get("held") for each in accounts.values())

        found = by_collector(accounts_when(bus, service, all_counted))
        print(f"{source}: live {len(arrived) / count:.2%} of {count}; {found}")
        assert found["live"]["sent"] == found["deaf"]["sent"] == count, found
        arrived += live.read(count - len(arrived))
        assert by_exporter([number_of(each.payload) for each in arrived]) == by_exporter(list(range(count)))
        for number in range(4):
            assert found[f"dead{number}"].get("sent", 0) < count / 5


@pytest.mark.parametrize("source", ["relay", "original"])
def test_full_interface_queue_is_counted(open_stack: OpenStack, source: Source) -> None:
    """Copies that an interface's queue throws away never count as delivered; the rest leaves when there is room."""
    with ExitStack() as opened:
        field, relay, siem = opened.enter_context(small_site(open_stack))
        live = opened.enter_context(Collector(siem, "10.2.0.2", LIVE))
        collector = f'name = "live"\nstreams = ["*"]\naddress = "10.2.0.2"\nport = {LIVE}\nsource = "{source}"\n'
        open_stack.configure(f"{SETTINGS}[[collector]]\n{collector}")
        relay.run(
            *["tc", "qdisc", "add", "dev", "siem", "root", "tbf", "rate", "2mbit", "burst", "70000", "limit", "90000"]
        )
        with relay.entered():
            open_stack["gateway"].stop()
            open_stack.start("gateway")
            open_stack.start("transmitter")
            wait_until(lambda: flows_to("live"), "copies flow")
        service = "forwarder.1" if source == "relay" else "transmitter.1"
        bus = opened.enter_context(BusEnds(open_stack.bus))
        accounts_when(bus, service, lambda found: "live" in by_collector(found))
        with Exporters(field, EXPORTERS, "10.1.0.1") as exporters:
            arrived, count = flood(exporters, live, 1.5)

        def all_counted(accounts: Accounts) -> bool:
            account = by_collector(accounts)["live"]
            return account.get("offered") == count and not account.get("held")

        found = by_collector(accounts_when(bus, service, all_counted))["live"]
        arrived += live.read(found["sent"] - len(arrived))
        assert len(arrived) == found["sent"] < count


@pytest.mark.soak
@pytest.mark.parametrize("source", ["relay", "original"])
def test_samplicator_in_the_same_place(open_stack: OpenStack, source: Source) -> None:
    """The share of samplicator's live collector beside the same others is printed, for services/forwarder/README.md."""
    if not shutil.which("samplicate"):
        pytest.skip("samplicate is not on PATH")
    with ExitStack() as opened:
        field, relay, siem = opened.enter_context(small_site(open_stack))
        live = opened.enter_context(Collector(siem, "10.2.0.2", LIVE))
        opened.enter_context(deaf(siem))
        receivers = [f"10.2.0.{60 + number}/9" for number in range(4)]
        receivers += [f"10.2.0.2/{port}" for port in (LIVE, REFUSING, DEAF)]
        with relay.entered():
            open_stack["ingest.1"].stop()
            command = ["samplicate", *(["-S"] if source == "original" else []), "-s", "10.1.0.1", "-p", "6667"]
            opened.callback(_end, subprocess.Popen([*command, "-b", "33554432", *receivers], stderr=subprocess.DEVNULL))
        time.sleep(0.5)
        exporters = opened.enter_context(Exporters(field, EXPORTERS, "10.1.0.1"))
        arrived, count = flood(exporters, live, 8)
        print(f"samplicator {source}: live {len(arrived) / count:.2%} of {count}")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    process.wait()
