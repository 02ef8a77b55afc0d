"""Copies that wait for a collector behind a slow link, when something else changes: each arrives or is counted."""

import socket
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pytest

from shared.ledger import Accounts, dropped
from tests.builders import BusEnds, accounts_when
from tests.capture import Collector
from tests.network import Host
from tests.openly import OpenStack
from tests.stack import DRAIN_SECONDS, ask_json
from tests.system.test_source_preserving import SETTINGS, small_site

COUNT = 605
SIZE = 1000
PORT = 9514
NAME = "collector/slow"


@dataclass
class SlowSite:
    """A relay, a collector's host behind an interface that takes less than is sent, and an exporter."""

    stack: OpenStack
    relay: Host
    siem: Host
    bus: BusEnds
    collector: Collector
    exporter: socket.socket

    def shape(self, rate: str) -> None:
        """Let the interface to the collector take this rate, see tc-tbf(8), and never drop."""
        limits = ["tbf", "rate", rate, "burst", "5000", "limit", "10000000"]
        self.relay.run("tc", "qdisc", "replace", "dev", "siem", "root", *limits)

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Ask the gateway, which has to agree."""
        with self.relay.entered():
            answer = ask_json({"name": "slow", "address": "10.2.0.2", "port": PORT, **request})
        assert answer["ok"], answer
        return answer

    def burst(self, start: int = 0) -> None:
        """Send numbered datagrams, and wait until the forwarder has them all, and some of them wait there."""
        for number in range(start, start + COUNT):
            self.exporter.send(number.to_bytes(4) + bytes(SIZE - 4))
        self.accounts_when(lambda account: account.get("offered") == start + COUNT and account["held"] > 0)

    def accounts_when(self, condition: Any) -> dict[str, int]:
        """The collector's account, as soon as it meets a condition."""
        found: Accounts = accounts_when(self.bus, "forwarder.1", lambda found: condition(found.get(NAME, {})))
        return found[NAME]

    def arrived(self, count: int) -> list[int]:
        """The numbers that arrived, as soon as there are so many and no more."""
        numbers = [int.from_bytes(each.payload[:4]) for each in self.collector.read(count)]
        self.collector.assert_quiet()
        return numbers


@pytest.fixture
def slow(open_stack: OpenStack) -> Iterator[SlowSite]:
    """The site, with all services but the transmitter."""
    with ExitStack() as opened:
        field, relay, siem = opened.enter_context(small_site(open_stack))
        collector = opened.enter_context(Collector(siem, "10.2.0.2", PORT))
        exporter = opened.enter_context(field.socket(socket.AF_INET, socket.SOCK_DGRAM))
        exporter.connect(("10.1.0.1", 6667))
        bus = opened.enter_context(BusEnds(open_stack.bus))
        yield SlowSite(open_stack, relay, siem, bus, collector, exporter)


@pytest.mark.parametrize(("rate", "seconds"), [("8mbit", 1), ("1mbit", 1), ("1mbit", 60)])
def test_sigterm_sends_or_counts_what_waits(slow: SlowSite, rate: str, seconds: int) -> None:
    """SIGTERM lets waiting copies leave in order within their time; the rest is counted, and none is held at the end."""
    slow.shape(rate)
    slow.stack.configure(f"{SETTINGS}[forwarder]\nqueue_seconds = {seconds}\n")
    with slow.relay.entered():
        slow.stack["forwarder"].stop()
        forwarder = slow.stack.start("forwarder")
    slow.ask({"op": "register", "streams": ["messages"]})
    slow.burst()
    assert forwarder.stop(seconds=DRAIN_SECONDS) == 0
    account = forwarder.events("drained")[0]["accounts"][NAME]
    numbers = slow.arrived(account["delivered"])
    assert sorted(set(numbers)) == numbers
    assert account["held"] == 0
    assert len(numbers) + dropped(account) == COUNT
    if rate == "8mbit":
        assert numbers == list(range(COUNT))
    else:
        assert account["dropped_buffer_full" if seconds == 1 else "dropped_stopped"] > 0
