"""SIGKILL of any one process, which a supervisor then starts again: nobody has to do anything else."""

import json
import signal
import socket
from contextlib import closing, suppress
from typing import Any

import pytest

from shared.ledger.equations import dropped
from tests.background import Background
from tests.openly import OpenStack
from tests.stack import PATIENT, ask_json, sign_up, wait_until
from tests.traffic import open_receiver, pause

EXPORTER = "127.0.0.2"


class Flood(Background):
    """Sends numbered datagrams until told to stop."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = 0

    def run(self) -> None:
        """Send, whether or not anybody listens."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.bind((EXPORTER, 0))
            while not self.stopping.is_set():
                sender.sendto(self.sent.to_bytes(4), ("127.0.0.1", 6667))
                self.sent += 1
                pause(0.002)


@pytest.mark.parametrize("name", ["broker", "gateway", "ingest", "forwarder", "transmitter"])
def test_whoever_is_killed_all_goes_on(open_stack: OpenStack, name: str) -> None:
    """Copies of both kinds flow again, none twice, with nothing registered anew; each that never came has its cause.

    Each collector's own count decides. Only what a killed worker had taken, or its closed port refused, is nobody's to
    know.
    """
    stack = open_stack
    stack.configure(PATIENT)
    stack.start_all()
    stack.start("transmitter")
    sink, _ = open_receiver("127.0.0.1", 9514)
    came: dict[bool, list[int]] = {True: [], False: []}
    flood = Flood()
    with closing(sink):
        sink.setblocking(False)
        for source in ("relay", "original"):
            sign_up({"name": source, "streams": ["messages"], "port": 9514, "source": source})
        flood.start()

        def both_reach(number: int) -> bool:
            with suppress(BlockingIOError):
                while True:
                    payload, (address, _) = sink.recvfrom(100)
                    came[address == EXPORTER].append(int.from_bytes(payload))
            return all(numbers and numbers[-1] >= number for numbers in came.values())

        wait_until(lambda: both_reach(100), "both kinds flow")
        listed = ask_json({"op": "list"})["clients"]
        killed = next(running for running in stack.running if running.name.partition(".")[0] == name)
        killed.stop(signal.SIGKILL)
        stack.start(killed.name)
        reached = flood.sent + 200
        try:
            wait_until(lambda: both_reach(reached), "both kinds flow again")
        finally:
            flood.stop()
        wait_until(lambda: both_reach(flood.sent - 1), "the last one comes")
    for numbers in came.values():
        assert len(set(numbers)) == len(numbers), "a copy came twice"
    assert {key: entry["generation"] for key, entry in ask_json({"op": "list"})["clients"].items()} == {
        key: entry["generation"] for key, entry in listed.items()
    }
    for running in stack.running:
        assert (running.process.poll() is None) == (running is not killed), running.text
        assert "Traceback" not in running.text
    for source, numbers in ((name, came[name == "original"]) for name in ("relay", "original")):
        account, taken = settled(stack, source, flood.sent if name != "ingest" else 0)
        lost = dropped(account) + account.get("missed", 0)
        assert 0 <= len(numbers) - (account["expected"] - lost) <= account.get("dropped_unsure", 0), account
        if name == "ingest":
            assert account["expected"] <= flood.sent
        else:
            assert taken == flood.sent


def settled(stack: OpenStack, source: str, sent: int) -> tuple[dict[str, int], int]:
    """A collector's account once nothing more is on its way, and all that was sent as far as services have counted it.

    The ledger has to be balanced.
    """
    sender = "forwarder.1" if source == "relay" else "transmitter.1"
    found: dict[str, Any] = {}

    def complete() -> bool:
        ledger = stack.operator("ledger", "--json", "--seconds", "20")
        assert ledger.process.wait(60) == 0, ledger.text
        found.update(json.loads(ledger.text)["services"])
        return found[sender][f"collector/{source}"].get("held", 0) == 0 and taken() >= sent

    def taken() -> int:
        stream = found["ingest.1"]["stream/messages"]
        refused: int = stream.get("dropped_bus_full", 0) + stream.get("kernel_dropped", 0)
        return int(found[sender][f"collector/{source}"]["expected"]) + refused

    wait_until(complete, lambda: f"{sent} are accounted for: {taken()}, {found[sender]}, {found['ingest.1']}")
    return found[sender][f"collector/{source}"], taken()
