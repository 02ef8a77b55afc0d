"""Restarts of a sender of copies, counted by the test: each datagram sent has arrived, or has a cause in the ledger."""

import json
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import pytest

from shared.ledger.accounts import Accounts
from shared.ledger.equations import dropped
from tests.background import Background, Reading
from tests.builders import BusEnds, accounts_when
from tests.openly import OpenStack
from tests.stack import PATIENT, sign_up, wait_until
from tests.traffic import open_receiver, pause

EXPORTERS = ("127.0.0.2", "127.0.0.3")
OURS = "127.0.0.1"
PORTS = {"counted": 9514, "some": 9515}
"""Collectors: one of all datagrams, and one of every third that is from the second exporter."""


class Numbered(Background):
    """Sends numbered datagrams, some hundred bytes each, from two exporters in turn until told to stop."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = 0
        """The exact number."""

    def run(self) -> None:
        """Send in small bursts."""
        with ExitStack() as opened:
            senders = [opened.enter_context(socket.socket(type=socket.SOCK_DGRAM)) for _ in EXPORTERS]
            for sender, address in zip(senders, EXPORTERS, strict=True):
                sender.bind((address, 0))
                sender.connect((OURS, 6667))
            while not self.stopping.is_set():
                for _ in range(8):
                    senders[self.sent % len(senders)].send(self.sent.to_bytes(4) + bytes(200))
                    self.sent += 1
                pause(0.01)


class Sink(Reading):
    """A collector's socket, read at once: `numbers` are those that came, in order."""

    def __init__(self, port: int) -> None:
        super().__init__(open_receiver(OURS, port)[0])
        self.numbers: list[int] = []

    def take(self, payload: bytes, _peer: Any) -> None:
        """Note a number."""
        self.numbers.append(int.from_bytes(payload[:4]))


@contextmanager
def served(stack: OpenStack, source: str) -> Iterator[dict[str, Sink]]:
    """All services, and the collectors, for copies of that kind."""
    stack.configure(PATIENT)
    stack.start_all()
    stack.start("transmitter")
    with ExitStack() as opened:
        sinks = {name: opened.enter_context(closing(Sink(port))) for name, port in PORTS.items()}
        for name, sink in sinks.items():
            sink.start()
            request = {"name": name, "streams": ["messages"], "port": PORTS[name], "source": source}
            if name == "some":
                request |= {"from": [f"{EXPORTERS[1]}/32"], "sample": 3}
            sign_up(request)
        yield sinks


@pytest.mark.parametrize(
    ("source", "number", "watched"),
    [
        ("relay", signal.SIGTERM, True),
        ("relay", signal.SIGKILL, False),
        ("original", signal.SIGTERM, False),
        ("original", signal.SIGKILL, True),
    ],
)
def test_a_restart_of_a_sender_loses_nothing_and_a_kill_nothing_that_is_not_counted(
    open_stack: OpenStack, source: str, number: signal.Signals, watched: bool
) -> None:
    """Twice under load, whether or not others read the stream meanwhile: sent is arrived plus lost by cause."""
    sender = "forwarder" if source == "relay" else "transmitter"
    with served(open_stack, source) as sinks:
        sink = sinks["counted"]
        if watched:
            watch = open_stack.operator("watch", "--json")
        load = Numbered()
        load.start()
        if watched:
            watch.wait_for("}")
        for _ in range(2):
            before = len(sink.numbers)
            wait_until(lambda before=before: len(sink.numbers) > before + 300, "copies flow")  # type: ignore[misc]
            open_stack[sender].stop(number)
            gone = load.sent
            wait_until(lambda gone=gone: load.sent > gone + 200, "more is sent meanwhile")  # type: ignore[misc]
            open_stack.start(sender)
        before = len(sink.numbers)
        wait_until(lambda: len(sink.numbers) > before + 300, "copies flow again")
        load.stop()
        sent = load.sent
        wait_until(lambda: sent - 1 in sink.numbers[-4096:], "the last one has come")

        def complete(found: Accounts) -> bool:
            return all(found.get(f"collector/{name}", {}).get("expected") == sent for name in PORTS)

        with BusEnds(open_stack.bus) as bus:
            kept = accounts_when(bus, f"{sender}.1", complete)
        if watched:
            watch.stop()
        found = {name: kept[f"collector/{name}"] for name in PORTS}
    for name, account in found.items():
        arrived = sinks[name].numbers
        print(f"{name}: sent {sent}, arrived {len(arrived)}, account {account}")
        for exporter in range(2):
            its = [each for each in arrived if each % 2 == exporter]
            assert its == sorted(set(its)), "none came twice, and each in its exporter's order"
        lost, unsure = dropped(account) + account.get("missed", 0), account.get("dropped_unsure", 0)
        left_out = account.get("filtered", 0) + account.get("sampled_out", 0)
        if number == signal.SIGTERM:
            assert lost == 0
        else:
            assert account["dropped_unserved"] >= 2 * 200
        assert lost - unsure <= sent - left_out - len(arrived) <= lost
    assert all(number % 2 for number in sinks["some"].numbers)
    some = found["some"]
    # Half of each burst of 8, and what was under way to one or the other at a kill: more where bursts have piled up.
    unsure = max(account.get("dropped_unsure", 0) for account in found.values())
    assert abs(some["filtered"] - some["offered"] / 2) <= 8 + unsure
    losses = {(each["of"], each["what"]): each["lost"] for each in ledger_losses(open_stack)}
    assert losses.get(("counted", "unserved"), 0) == found["counted"].get("dropped_unserved", 0)


@pytest.mark.parametrize("watched", [True, False])
def test_what_a_killed_worker_had_is_counted_by_a_sender_that_was_away(open_stack: OpenStack, watched: bool) -> None:
    """Worker and forwarder are both killed: the worker's successor tells how much there was, published or unwanted."""
    with served(open_stack, "relay") as sinks, ExitStack() as opened:
        if watched:
            opened.callback(open_stack.operator("watch", "--json").stop)
        sent = 0
        for away in (False, True, True):
            if away and sent == 40:
                open_stack["forwarder"].stop(signal.SIGKILL)
            with BusEnds(open_stack.bus) as bus, socket.socket(type=socket.SOCK_DGRAM) as exporter:
                exporter.bind((EXPORTERS[1], 0))
                for number in range(sent, sent + 40):
                    exporter.sendto(number.to_bytes(4), (OURS, 6667))
                sent += 40
                accounts_when(bus, "ingest.1", lambda found: found["stream/messages"].get("received") == 40)
            if not away:
                wait_until(lambda: len(sinks["counted"].numbers) == 40, "copies have come")
            open_stack["ingest.1"].stop(signal.SIGKILL)
            open_stack.start("ingest.1")
        open_stack.start("forwarder")
        with BusEnds(open_stack.bus) as bus:
            kept = accounts_when(bus, "forwarder.1", lambda found: found["collector/counted"]["expected"] == sent)
        ledger_losses(open_stack)
    assert sinks["counted"].numbers == [*range(40)]
    assert kept["collector/counted"]["dropped_unserved"] == 80
    assert sinks["some"].numbers == [*range(0, 40, 3)]
    assert kept["collector/some"]["dropped_unserved"] == 80


def ledger_losses(stack: OpenStack) -> list[dict[str, object]]:
    """The ledger's losses; it must be balanced."""
    asked = stack.operator("ledger", "--json", "--seconds", "20")
    assert asked.process.wait(60) == 0, asked.text
    losses: list[dict[str, object]] = json.loads(asked.text)["losses"]
    return losses
