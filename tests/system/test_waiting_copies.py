"""Copies that wait for a collector behind a slow link, when something else changes: each arrives or is counted."""

import json
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

from shared.ledger.accounts import Accounts
from shared.ledger.equations import dropped
from tests.builders import BusEnds, accounts_when
from tests.capture import Collector
from tests.network import Host
from tests.openly import OpenStack
from tests.stack import DRAIN_SECONDS, Running, ask_json, flows_to, sign_up, wait_until
from tests.system.test_source_preserving import SETTINGS, small_site

COUNT = 605
SIZE = 1000
PORT = 9514
SLOW = "500kbit"
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
    entry: ClassVar = {"name": "slow", "address": "10.2.0.2", "port": PORT}

    def shape(self, rate: str) -> None:
        """Let the interface to the collector take this rate, see tc-tbf(8), and never drop."""
        limits = ["tbf", "rate", rate, "burst", "5000", "limit", "10000000"]
        self.relay.run("tc", "qdisc", "replace", "dev", "siem", "root", *limits)

    @property
    def forwarder(self) -> Running:
        """The forwarder."""
        return self.stack["forwarder"]

    def clients(self) -> dict[str, Any]:
        """The gateway's list."""
        with self.relay.entered():
            clients: dict[str, Any] = ask_json({"op": "list"})["clients"]
        return clients

    def burst(self, start: int = 0) -> None:
        """Send numbered datagrams, and wait until the forwarder has them all, and some of them wait, or have, there."""
        for number in range(start, start + COUNT):
            self.exporter.send(number.to_bytes(4) + bytes(SIZE - 4))
        self.accounts_when(
            lambda account: (
                account.get("offered") == start + COUNT and (account["held"] or account.get("dropped_buffer_full"))
            )
        )

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
def seconds() -> int:
    """The time that copies wait for the interface."""
    return 60


@pytest.fixture
def slow(open_stack: OpenStack, seconds: int) -> Iterator[SlowSite]:
    """The site, with all services but the transmitter."""
    with ExitStack() as opened:
        settings = f"{SETTINGS}[forwarder]\nqueue_seconds = {seconds}\n"
        field, relay, siem = opened.enter_context(small_site(open_stack, settings))
        collector = opened.enter_context(Collector(siem, "10.2.0.2", PORT))
        exporter = opened.enter_context(field.socket(socket.AF_INET, socket.SOCK_DGRAM))
        exporter.connect(("10.1.0.1", 6667))
        bus = opened.enter_context(BusEnds(open_stack.bus))
        yield SlowSite(open_stack, relay, siem, bus, collector, exporter)


@pytest.mark.parametrize(("rate", "seconds"), [("20mbit", 60), ("1mbit", 1), ("1mbit", 60)])
def test_sigterm_sends_or_counts_what_waits(slow: SlowSite, rate: str, seconds: int) -> None:
    """SIGTERM lets waiting copies leave in order within their time; the rest is counted, none is held at the end."""
    with slow.relay.entered():
        sign_up(slow.entry | {"streams": ["messages"]})
    slow.shape(SLOW)
    slow.burst()
    slow.shape(rate)
    assert slow.forwarder.stop(seconds=DRAIN_SECONDS) == 0
    account = slow.forwarder.events("drained")[0]["accounts"][NAME]
    numbers = slow.arrived(account["sent"])
    assert sorted(set(numbers)) == numbers
    assert account["held"] == 0
    assert len(numbers) + dropped(account) == COUNT
    if rate == "20mbit":
        assert numbers == list(range(COUNT))
    else:
        assert account["dropped_buffer_full" if seconds == 1 else "dropped_stopped"] > 0


Register = Callable[[dict[str, Any]], None]


@contextmanager
def connected(slow: SlowSite) -> Iterator[Register]:
    """A connection that holds the entries that it makes."""
    with slow.relay.entered():
        connection = socket.create_connection(("127.0.0.1", 5000))

    def register(terms: dict[str, Any]) -> None:
        print(json.dumps(slow.entry | {"op": "register", "hold": True} | terms), file=lines, flush=True)
        answer = json.loads(lines.readline())
        assert answer["ok"], answer
        with slow.relay.entered():
            wait_until(lambda: flows_to("slow"), "copies flow")

    with connection, connection.makefile("rw") as lines:
        yield register


def test_signing_up_again_keeps_what_waits(slow: SlowSite) -> None:
    """Copies that wait stay, with socket, queue and account, whatever changes but the address and the port."""
    line = {"streams": ["messages"]}
    filtered = line | {"from": ["10.1.0.0/16"], "dscp": 8}
    taken_over = {"streams": ["*"], "hop_limit": 9, "take_over": True}
    total = 0

    def keeps(register: Register, terms: dict[str, Any]) -> None:
        nonlocal total
        slow.shape(SLOW)
        slow.burst(total)
        register(terms)
        slow.shape("20mbit")
        assert slow.arrived(COUNT) == list(range(total, total + COUNT))
        total += COUNT

    with connected(slow) as first, connected(slow) as second:
        first(line)
        keeps(first, line)
        keeps(first, filtered)
        keeps(second, taken_over)
        slow.shape(SLOW)
        slow.burst(total)
    wait_until(lambda: "slow" not in slow.clients(), "its entry has gone with its connection")
    with connected(slow) as third:
        third(line)
        slow.shape("20mbit")
        assert slow.arrived(COUNT) == list(range(total, total + COUNT))
        account = slow.accounts_when(lambda account: not account["held"])
    assert account["expected"] == account["offered"] == account["sent"] == total + COUNT
    assert account["bytes"] == (total + COUNT) * SIZE


def test_copies_that_wait_for_a_collector_that_moves_or_leaves_are_counted(slow: SlowSite) -> None:
    """Nothing goes to an address that a collector has left; each copy that waited for it is counted."""

    def left_beyond(before: int) -> int:
        found = accounts_when(slow.bus, "forwarder.1", lambda found: found["forwarder"]["dropped_left"] > before)
        return found["forwarder"]["dropped_left"]

    def got(collector: Collector, count: int) -> None:
        slow.shape("20mbit")
        assert [int.from_bytes(each.payload[:4]) for each in collector.read(count)] == list(range(count))
        collector.assert_quiet()
        slow.shape(SLOW)

    slow.shape(SLOW)
    with Collector(slow.siem, "10.2.0.2", PORT + 1) as other:
        with connected(slow) as first:
            first({"streams": ["messages"]})
            slow.burst()
            first({"streams": ["messages"], "port": other.port})
            moved = left_beyond(0)
            got(slow.collector, COUNT - moved)
            slow.burst()
        wait_until(lambda: "slow" not in slow.clients(), "its entry has gone with its connection")
        with connected(slow) as second:
            second({"streams": ["messages"], "port": 9})
            got(other, COUNT + moved - left_beyond(moved))
