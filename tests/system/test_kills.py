"""SIGKILL of any one process, which a supervisor then starts again: nobody has to do anything else."""

import signal
import socket
import threading
from contextlib import closing, suppress

import pytest

from tests.openly import OpenStack
from tests.stack import PATIENT, ask_json, wait_until
from tests.traffic import open_receiver, pause

EXPORTER = "127.0.0.2"


class Flood(threading.Thread):
    """Sends numbered datagrams until told to stop."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.stopping = threading.Event()
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
    """Copies of both kinds flow again, none of them twice, with nothing registered anew; the other processes run on."""
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
            request = {"op": "register", "name": source, "streams": ["messages"], "port": 9514, "source": source}
            wait_until(lambda request=request: ask_json(request)["ok"], f"{source} is signed up")  # type: ignore[misc]
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
            flood.stopping.set()
            flood.join()
    for numbers in came.values():
        assert len(set(numbers)) == len(numbers), "a copy came twice"
    assert {key: entry["generation"] for key, entry in ask_json({"op": "list"})["clients"].items()} == {
        key: entry["generation"] for key, entry in listed.items()
    }
    for running in stack.running:
        assert (running.process.poll() is None) == (running is not killed), running.text
        assert "Traceback" not in running.text
    ledger = stack.operator("ledger", "--json")
    assert ledger.process.wait(60) == 0, ledger.text
