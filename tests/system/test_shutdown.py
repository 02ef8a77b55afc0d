"""Each process ends cleanly under load."""

import signal
import socket
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from shared.ledger.equations import dropped
from tests.background import Background, Reading
from tests.builders import freeze, kill_all
from tests.stack import DRAIN_SECONDS, Stack, ask_json, sign_up, wait_until
from tests.traffic import exporters, open_receiver, pause


class Load(Background):
    """Sends datagrams in bursts, some ten thousand a second, until told to stop."""

    def __init__(self, sources: list[socket.socket]) -> None:
        super().__init__()
        self._sources = sources
        self.sent = 0

    def run(self) -> None:
        """Send bursts."""
        while not self.stopping.is_set():
            for sock in self._sources:
                with suppress(ConnectionRefusedError):  # the listener has ended
                    for _ in range(16):
                        sock.send(b"x" * 300)
                        self.sent += 1
            pause(0.002)


class Arrived(Reading):
    """Counts what comes to a collector's socket, until told to stop."""

    count = 0

    def take(self, _payload: bytes, _peer: Any) -> None:
        """Count a datagram."""
        self.count += 1


@pytest.mark.parametrize("name", ["ingest.1", "forwarder", "gateway", "broker"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_each_process_drains_under_load(stack: Stack, name: str, number: signal.Signals) -> None:
    """SIGTERM or Ctrl-C under load: drained, exit 0, before the supervisor would kill, and nothing is left behind."""
    stack.configure(f'[[stream]]\nname = "s"\nlisten = ["udp://127.0.0.1:7000", "unixgram://{stack.directory}/s"]\n')
    stack.start_all()
    sink, _ = open_receiver("127.0.0.1", 9100)
    with closing(sink), exporters(4, 7000) as sources:
        sign_up({"name": "c", "streams": ["s"], "port": 9100})
        load = Load(sources)
        load.start()
        arrived = Arrived(sink)
        arrived.start()
        wait_until(lambda: arrived.count > 1000, "copies flow")
        assert stack[name].stop(number, seconds=DRAIN_SECONDS) == 0
        load.stop()
        drained = {event["service"]: event for running in stack.running for event in running.events("drained")}
        if name == "ingest.1":
            assert drained[name]["stream/s"]["published"] == drained[name]["stream/s"]["received"] <= load.sent
            wait_until(lambda: arrived.count == drained[name]["stream/s"]["received"], "all that it had taken arrives")
        if name == "forwarder":
            account = drained["forwarder.1"]["accounts"]["collector/c"]
            wait_until(lambda: arrived.count == account["sent"], "all that it says it sent arrives")
            assert account["sent"] + dropped(account) == account["offered"]
        arrived.stop()
    for other in ("ingest.1", "forwarder", "gateway", "broker"):
        if other != name:
            assert stack[other].process.poll() is None, f"{other} ended with {name}: {stack[other].text}"
            assert stack[other].stop(seconds=DRAIN_SECONDS) == 0
    assert not (stack.directory / "s").exists()
    assert {path.name for path in stack.bus.iterdir()} == {
        *("lock", "pool.1.lock", "registry.sqlite", "accounts.forwarder", "accounts.ingest.1"),
    }


@pytest.mark.parametrize("name", ["ingest.1", "forwarder", "gateway"])
def test_each_process_ends_beside_a_broker_that_stands_still(stack: Stack, name: str) -> None:
    """With messages that nobody takes any more a process still ends with 0 before the supervisor would kill."""
    stack.configure('[[stream]]\nname = "s"\nlisten = ["udp://127.0.0.1:7000"]\n')
    stack.start_all()
    with exporters(4, 7000) as sources:
        sign_up({"name": "c", "streams": ["s"], "port": 9100})
        freeze(stack["broker"])
        load = Load(sources)
        load.start()
        for number in range(100):
            ask_json({"op": "register", "name": f"n{number}"})
        pause(1)  # for the status that each publishes every second
        assert stack[name].stop(seconds=DRAIN_SECONDS) == 0
        load.stop()
    kill_all(stack)


def test_stopping_everything_loses_nothing_that_was_taken(stack: Stack) -> None:
    """All processes told to stop at once: what ingest had received is delivered before the forwarder goes."""
    stack.start_all()
    sink, _ = open_receiver("127.0.0.1", 9100)
    with closing(sink), exporters(4, 6667) as sources:
        sign_up({"name": "c", "streams": ["messages"], "port": 9100})
        for number in range(400):
            sources[number % 4].send(b"%d" % number)
        for running in stack.running:
            running.process.send_signal(signal.SIGTERM)
        for running in stack.running:
            assert running.process.wait(DRAIN_SECONDS) == 0, running.name
        received = stack["ingest.1"].events("drained")[0]["stream/messages"]["received"]
        sink.settimeout(1)
        assert received == 400
        assert len([sink.recv(100) for _ in range(received)]) == received


def test_no_children_no_sockets_no_files(stack: Stack) -> None:
    """No process starts children, and no TCP or UDP socket outlives the stack."""
    stack.start_all()
    for running in stack.running:
        pid = running.process.pid
        assert not Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    for running in reversed(stack.running):
        assert running.stop() == 0
    wait_until(lambda: _listening() == [], f"sockets {_listening()} are gone")


def _listening() -> list[str]:
    tables = (Path(f"/proc/self/net/{name}") for name in ("udp", "udp6"))
    return [line.split()[1] for table in tables for line in table.read_text().splitlines()[1:]]
