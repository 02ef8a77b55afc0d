"""Collectors that were away catch up: by their own count they have each datagram once, in each exporter's order."""

import random
import signal
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from itertools import pairwise
from typing import Any

import pytest

from shared.ledger.accounts import Accounts
from shared.ledger.equations import dropped
from tests.background import Background, Reading
from tests.builders import BusEnds, accounts_when
from tests.openly import OpenStack
from tests.stack import PATIENT, ask_json, sign_up, wait_until
from tests.traffic import open_receiver, pause

EXPORTERS = [f"127.0.1.{number}" for number in range(1, 17)]
OURS = "127.0.0.1"
SETTINGS = """
[[stream]]
name = "messages"
listen = ["udp://localhost:6667"]
journal = true
[journal]
directory = "{directory}"
min_free = 0
catch_up_per_second = {per_second}
"""


class Exporters(Background):
    """Exporters that send numbered datagrams in turn until told to stop; `sent` is how many each has sent."""

    def __init__(self, per_second: int = 750) -> None:
        super().__init__()
        self.sent = [0] * len(EXPORTERS)
        self._per_second = per_second
        self.paused, self.idle = threading.Event(), threading.Event()

    def run(self) -> None:
        """Send in bursts of one from each."""
        with ExitStack() as opened:
            sockets = [opened.enter_context(socket.socket(type=socket.SOCK_DGRAM)) for _ in EXPORTERS]
            for number, sock in enumerate(sockets):
                sock.bind((EXPORTERS[number], 0))
                sock.connect((OURS, 6667))
            began, rounds = time.monotonic(), 0
            while not self.stopping.is_set():
                for number, sock in enumerate(sockets):
                    sock.send(bytes((number,)) + self.sent[number].to_bytes(4) + bytes(100 + 13 * number))
                    self.sent[number] += 1
                rounds += 1
                while self.paused.is_set() and not self.stopping.is_set():
                    self.idle.set()
                    pause(0.01)
                    began = time.monotonic() - rounds * len(sockets) / self._per_second
                pause(max(0.0, began + rounds * len(sockets) / self._per_second - time.monotonic()))


class Counted(Reading):
    """A collector's socket: `numbers` are those that came, in order, by exporter; `sources` are their addresses."""

    def __init__(self, port: int) -> None:
        super().__init__(open_receiver(OURS, port)[0])
        self.numbers: defaultdict[int, list[int]] = defaultdict(list)
        self.sources: defaultdict[int, set[str]] = defaultdict(set)
        self.count = 0

    def take(self, payload: bytes, peer: Any) -> None:
        """Note a datagram."""
        if found := self.read(payload):
            exporter, number = found
            self.numbers[exporter].append(number)
            self.sources[exporter].add(peer[0])
            self.count += 1

    def read(self, payload: bytes) -> tuple[int, int] | None:
        """Return exporter and number of a datagram that counts."""
        return payload[0], int.from_bytes(payload[1:5])

    def assert_whole(self, sent: list[int]) -> None:
        """Assert that each number came once and in order."""
        for number, count in enumerate(sent):
            assert self.numbers[number] == list(range(count)), f"exporter {number}"


def register(name: str, source: str, port: int, **more: Any) -> dict[str, Any]:
    """Sign up; return the entry."""
    return sign_up({"name": name, "streams": ["messages"], "port": port, "source": source, **more})


def leave(name: str, granted: dict[str, Any]) -> None:
    """Leave."""
    assert ask_json({"op": "leave", "name": name, "generation": granted["generation"]})["ok"]


def entry(name: str) -> dict[str, Any]:
    """Return an entry as the registry shows it."""
    found: dict[str, Any] = ask_json({"op": "list"})["clients"].get(name, {})
    return found


def wait_level(name: str) -> None:
    """Wait until a collector no longer catches up."""
    wait_until(lambda: entry(name) and "catching_up" not in entry(name), lambda: f"{name} is level: {entry(name)}")


@contextmanager
def served(stack: OpenStack, per_second: int = 50_000, more: str = "") -> Iterator[None]:
    """All services, the journal among them."""
    stack.configure(PATIENT + SETTINGS.format(directory=stack.directory / "journal", per_second=per_second) + more)
    stack.start_all()
    for name in ("transmitter", "journal"):
        stack.start(name)
    with BusEnds(stack.bus) as ends:
        accounts_when(ends, "journal.1", lambda accounts: any(name.startswith("origin/") for name in accounts))
    yield


@pytest.mark.parametrize("source", ["relay", "original"])
def test_a_collector_that_was_away_misses_nothing(open_stack: OpenStack, source: str) -> None:
    """It leaves under load, comes back and asks for what it missed; the accounts say the same as its own count."""
    sender = "forwarder" if source == "relay" else "transmitter"
    with (
        served(open_stack),
        closing(Counted(9514)) as away,
        closing(Counted(9515)) as live,
        BusEnds(open_stack.bus) as ends,
    ):
        away.start()
        live.start()
        granted = register("away", source, 9514)
        register("live", source, 9515)
        load = Exporters()
        load.start()
        wait_until(lambda: away.count > 300, "copies flow")
        leave("away", granted)
        wait_until(lambda: live.count > away.count + 1000, "it misses a thousand")
        granted = register("away", source, 9514, since="left")
        wait_level("away")
        here = live.count
        wait_until(lambda: live.count > here + 150, "live copies flow")
        load.stop()
        sent = sum(load.sent)
        wait_until(lambda: live.count == away.count == sent, lambda: f"{live.count} {away.count} of {sent}")
        away.assert_whole(load.sent)
        live.assert_whole(load.sent)
        if source == "original":
            assert away.sources == {number: {address} for number, address in enumerate(EXPORTERS)}

        def settled(accounts: Accounts) -> bool:
            account = accounts.get("collector/away", {})
            return account.get("sent", 0) > 0 and accounts["collector/live"].get("sent") == sent

        for event in ("a collector begins to catch up", "a collector has caught up"):
            assert open_stack[sender].events(event), event
        account = accounts_when(ends, f"{sender}.1", settled)["collector/away"]
        assert (account["expected"], dropped(account), account.get("deferred", 0)) == (account["sent"], 0, 0)


def test_since_brings_the_past_from_a_time_on(open_stack: OpenStack) -> None:
    """A collector that is new gets what was received since then, in order and once, filtered as live copies are."""
    with served(open_stack), ExitStack() as opened:
        sinks = {name: opened.enter_context(closing(Counted(port))) for name, port in (("new", 9514), ("some", 9515))}
        load = Exporters()
        began = time.time()
        load.start()
        wait_until(lambda: sum(load.sent) > 1000, "time passes")
        for sink in sinks.values():
            sink.start()
        register("new", "relay", 9514, since=time.time() - began + 1)
        wanted = EXPORTERS[3]
        register("some", "original", 9515, since=3600, **{"from": [f"{wanted}/32"]})
        for name in sinks:
            wait_level(name)
        load.stop()
        sent = sum(load.sent)
        wait_until(lambda: sinks["new"].count == sent, lambda: f"{sinks['new'].count} of {sent}")
        sinks["new"].assert_whole(load.sent)
        wait_until(lambda: sinks["some"].count == load.sent[3], lambda: f"{sinks['some'].count} of {load.sent[3]}")
        assert sinks["some"].numbers == {3: list(range(load.sent[3]))}
        assert sinks["some"].sources == {3: {wanted}}


def test_a_collector_whose_port_is_closed_for_a_while_misses_nothing(open_stack: OpenStack) -> None:
    """One of the settings, which never signs up, is restarted: what it missed comes first, and is no loss."""
    collector = '[[collector]]\nname = "siem"\nstreams = ["messages"]\naddress = "127.0.0.1"\nport = 9514\n'
    with served(open_stack, more=collector + "catch_up = true\n"), BusEnds(open_stack.bus) as ends:
        load = Exporters()
        with closing(Counted(9514)) as first:
            first.start()
            load.start()
            wait_until(lambda: first.count > 500, "copies flow")
            load.paused.set()  # what is in the buffer of a socket that is closed would be lost with it
            wait_until(lambda: load.idle.is_set() and first.count == sum(load.sent), "all of it has come")
        load.paused.clear()
        before = sum(load.sent)
        wait_until(lambda: entry("siem").get("catching_up"), lambda: f"it is found to be away: {entry('siem')}")
        wait_until(lambda: sum(load.sent) > before + 1500, "time passes")
        with closing(Counted(9514)) as second:
            second.start()
            wait_until(lambda: second.count > 1500, lambda: f"it catches up: {second.count} {entry('siem')}")
            wait_level("siem")
            load.stop()
            sent = sum(load.sent)
            wait_until(lambda: first.count + second.count >= sent, lambda: f"{first.count} + {second.count} of {sent}")
        for number, count in enumerate(load.sent):
            assert first.numbers[number] + second.numbers[number] == list(range(count))

        def settled(accounts: Accounts) -> bool:
            account = accounts.get("collector/siem", {})
            return account.get("sent", 0) >= sent and not account.get("deferred")

        account = accounts_when(ends, "forwarder.1", settled)["collector/siem"]
        assert dropped(account) == 0
        assert account["expected"] == account["sent"] + account.get("left_behind", 0)
        assert account["sent"] - sent < 100, "it is tried with single datagrams"
        assert open_stack["forwarder"].events("a collector is away: what it misses comes later, from the journal")


def assert_accounted(away: Counted, sent: list[int], account: dict[str, int]) -> None:
    """Assert that what came is in order and came once, and that what did not come has a cause."""
    missing = 0
    for number, count in enumerate(sent):
        numbers = away.numbers[number]
        assert all(one < other for one, other in pairwise(numbers)), f"exporter {number}: twice, or out of order"
        missing += count - len(numbers)
    assert missing <= dropped(account), (missing, account)
    earlier = sum(sent) - account["expected"]  # by an account that ended while it was away
    assert 0 <= away.count - earlier - account["sent"] <= account.get("dropped_unsure", 0), (earlier, account)


def kill_and_catch_up(stack: OpenStack, source: str, kills: int, away_for: int, per_second: int, seed: int) -> int:
    """Let a collector be away, and kill a service at random while it catches up, so often; return what was unsure."""
    sender = "forwarder" if source == "relay" else "transmitter"
    draw = random.Random(seed)
    with (
        served(stack, 2 * per_second),
        closing(Counted(9514)) as away,
        BusEnds(stack.bus) as ends,
    ):
        away.start()
        granted = register("away", source, 9514)
        load = Exporters(per_second)
        load.start()
        wait_until(lambda: away.count > 1000, "copies flow")
        leave("away", granted)
        before = sum(load.sent)
        wait_until(lambda: sum(load.sent) > before + away_for, "time passes")
        register("away", source, 9514, since="left")
        done, victims = 0, []
        for _ in range(kills):
            pause(draw.uniform(0.2, 1.0))
            victim = draw.choice(("journal", sender, "gateway"))
            victims.append(victim)
            done += "catching_up" in entry("away") if victim != "gateway" else 0
            stack[victim].stop(signal.SIGKILL)
            stack.start(victim)
            wait_until(lambda: entry("away"), "the registry is there")
        load.stop()
        total = sum(load.sent)
        wait_level("away")

        def settled(accounts: Accounts) -> bool:
            account = accounts.get("collector/away", {})
            return "sent" in account and not account.get("deferred") and account["sent"] <= away.count

        account = accounts_when(ends, f"{sender}.1", settled)["collector/away"]
        wait_until(lambda: away.count >= account["sent"], "copies arrive")
        print(victims, source, "seed", seed, "sent", total, "came", away.count, "while behind", done, account)
        assert_accounted(away, load.sent, account)
        return total - away.count


@pytest.mark.parametrize(("source", "seed"), [("relay", 1)])
def test_kills_during_catching_up_lose_nothing_without_a_cause(open_stack: OpenStack, source: str, seed: int) -> None:
    """Journal, sender and gateway are killed while it catches up: what came is in order and came once."""
    lost = kill_and_catch_up(open_stack, source, 2, 2000, 1000, seed)
    assert lost <= 2 * 128


@pytest.mark.soak
@pytest.mark.parametrize(("source", "seed"), [("relay", 3), ("original", 4)])
def test_twenty_kills_during_catching_up(open_stack: OpenStack, source: str, seed: int) -> None:
    """Likewise twenty times, at random, over a catch-up that lasts."""
    lost = kill_and_catch_up(open_stack, source, 20, 120_000, 4000, seed)
    assert lost <= 20 * 128


@pytest.mark.soak
def test_three_catch_up_at_once_and_live_ones_lose_nothing(open_stack: OpenStack) -> None:
    """Three are at different places of the past while two get live copies: each has all of it, once and in order."""
    places = {"first": "relay", "second": "original", "third": "relay"}
    with served(open_stack), ExitStack() as opened:
        names = (*places, "relay", "original")
        sinks = {name: opened.enter_context(closing(Counted(9514 + n))) for n, name in enumerate(names)}
        for sink in sinks.values():
            sink.start()
        for name in ("relay", "original"):
            register(name, name, 9514 + names.index(name))
        granted = {name: register(name, source, 9514 + names.index(name)) for name, source in places.items()}
        load = Exporters(5000)
        load.start()
        for name in places:
            here = sum(load.sent)
            wait_until(lambda here=here: sum(load.sent) > here + 20_000, "time passes")  # type: ignore[misc]
            leave(name, granted[name])
        here = sum(load.sent)
        wait_until(lambda: sum(load.sent) > here + 100_000, "time passes")
        for name, source in places.items():
            register(name, source, 9514 + names.index(name), since="left")
        for name in places:
            wait_level(name)
        load.stop()
        sent = sum(load.sent)
        for name, sink in sinks.items():
            wait_until(lambda sink=sink: sink.count >= sent, lambda sink=sink, name=name: f"{name}: {sink.count}")  # type: ignore[misc]
            sink.assert_whole(load.sent)
