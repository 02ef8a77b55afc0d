"""Restarts of a sender of copies, counted by the test: each datagram sent has arrived, or has a cause in the ledger."""

import json
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress

import pytest

from shared.ledger import dropped
from shared.net.sockets import enlarge_receive_buffer
from tests.openly import OpenStack
from tests.stack import PATIENT, ask_json, wait_until
from tests.system.test_workers import reports
from tests.traffic import open_receiver, pause

EXPORTER = "127.0.0.2"
OURS = "127.0.0.1"
PORT = 9514


class Numbered(threading.Thread):
    """Sends numbered datagrams, some hundred bytes each, until told to stop; `sent` is exact."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._stopping = threading.Event()
        self.sent = 0

    def run(self) -> None:
        """Send in small bursts."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.bind((EXPORTER, 0))
            sender.connect((OURS, 6667))
            while not self._stopping.is_set():
                for _ in range(8):
                    sender.send(self.sent.to_bytes(4) + bytes(200))
                    self.sent += 1
                pause(0.002)

    def stop(self) -> int:
        """Stop, and return how many were sent."""
        self._stopping.set()
        self.join()
        return self.sent


class Sink(threading.Thread):
    """A collector's socket, read at once: `numbers` are those that came, in order."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self.socket, _ = open_receiver(OURS, port)
        enlarge_receive_buffer(self.socket, 1 << 25)
        self.socket.settimeout(0.1)
        self.numbers: list[int] = []
        self._ending = False

    def run(self) -> None:
        """Read until told to end."""
        while not self._ending:
            with suppress(TimeoutError):
                self.numbers.append(int.from_bytes(self.socket.recv(1000)[:4]))

    def close(self) -> None:
        """End."""
        self._ending = True
        self.join()
        self.socket.close()


@contextmanager
def served(stack: OpenStack, source: str, *names: str) -> Iterator[Sink]:
    """All services, and a collector of that source that has signed up; others of these names beside it."""
    stack.configure(PATIENT)
    stack.start_all()
    stack.start("transmitter")
    sink = Sink(PORT)
    sink.start()
    with closing(sink):
        for name in ("counted", *names):
            port = PORT if name == "counted" else 9
            request = {"op": "register", "name": name, "streams": ["messages"], "port": port, "source": source}
            wait_until(lambda request=request: ask_json(request)["ok"], f"{name} is signed up")  # type: ignore[misc]
        yield sink


@pytest.mark.parametrize(
    ("source", "number", "watched"),
    [
        ("relay", signal.SIGTERM, True),
        ("relay", signal.SIGKILL, False),
        ("original", signal.SIGTERM, False),
        ("original", signal.SIGKILL, True),
    ],
)
def test_a_restart_of_a_sender_loses_nothing_that_is_not_counted(
    open_stack: OpenStack, source: str, number: signal.Signals, watched: bool
) -> None:
    """Two restarts under load, whether or not others read the stream meanwhile: sent is arrived plus lost by cause."""
    sender = "forwarder" if source == "relay" else "transmitter"
    with served(open_stack, source) as sink:
        if watched:
            watch = open_stack.operator("watch", "--json")
            wait_until(lambda: "stream/messages" in reports(open_stack)["ingest.1"], "ingest reports")
        load = Numbered()
        load.start()
        for _ in range(2):
            before = len(sink.numbers)
            wait_until(lambda before=before: len(sink.numbers) > before + 1000, "copies flow")  # type: ignore[misc]
            open_stack[sender].stop(number)
            gone = load.sent
            wait_until(lambda gone=gone: load.sent > gone + 200, "more is sent meanwhile")  # type: ignore[misc]
            open_stack.start(sender)
        before = len(sink.numbers)
        wait_until(lambda: len(sink.numbers) > before + 1000, "copies flow again")
        sent = load.stop()
        wait_until(lambda: sink.numbers[-1] == sent - 1, "the last one has come")

        def account() -> dict[str, int]:
            return reports(open_stack)[f"{sender}.1"]["collector/counted"]

        wait_until(lambda: account()["expected"] == sent, lambda: f"{sent} are expected: {account()}")
        if watched:
            watch.stop()
    found = account()
    print(f"sent {sent}, arrived {len(sink.numbers)}, account {found}")
    assert sink.numbers == sorted(set(sink.numbers)), "none came twice, and each in its order"
    lost, unsure = dropped(found) + found.get("missed", 0), found.get("dropped_unsure", 0)
    assert found["dropped_unserved"] >= 2 * 200
    assert lost - unsure <= sent - len(sink.numbers) <= lost
    if number == signal.SIGTERM:
        assert unsure == 0
    losses = {(each["of"], each["what"]): each["lost"] for each in ledger_losses(open_stack)}
    assert losses["counted", "unserved"] == found["dropped_unserved"]


def ledger_losses(stack: OpenStack) -> list[dict[str, object]]:
    """The ledger's losses; it must be balanced."""
    asked = stack.operator("ledger", "--json", "--seconds", "20")
    assert asked.process.wait(60) == 0, asked.text
    losses: list[dict[str, object]] = json.loads(asked.text)["losses"]
    return losses
