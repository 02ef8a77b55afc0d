"""Many ingest workers, and what the loss of one costs."""

import json
import os
import shutil
import signal
import socket
import sys
from contextlib import closing
from itertools import pairwise
from pathlib import Path

from tests.background import Background
from tests.stack import CHECKOUT, Running, Stack, sign_up, wait_until
from tests.traffic import exporters, open_receiver, pause

EXPORTERS = 64


def reports(stack: Stack) -> dict[str, dict[str, dict[str, int]]]:
    """All accounts, by service."""
    ledger = stack.operator("ledger", "--json")
    ledger.process.wait(60)
    services: dict[str, dict[str, dict[str, int]]] = json.loads(ledger.text)["services"]
    return services


def descendants(pid: int) -> list[int]:
    """Processes started by a process."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def start_honcho(stack: Stack, *arguments: str) -> Running:
    """Run `honcho start` with these arguments."""
    honcho = shutil.which("honcho", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert honcho
    return stack.spawn("honcho", [honcho, "-d", str(CHECKOUT), "start", *arguments])


def test_honcho_runs_four_workers_that_all_receive(stack: Stack) -> None:
    """`honcho start -c ingest=4` gives four workers, the exporters spread over all of them; SIGTERM ends all with 0."""
    honcho = start_honcho(stack, "-c", "ingest=4")
    for number in range(4):
        honcho.wait_for(f'"service": "ingest.{number + 1}"')
    ready = stack.operator("ready")
    assert ready.process.wait(60) == 0, ready.text
    processes = len((CHECKOUT / "Procfile").read_text().splitlines()) + 3
    sink, _ = open_receiver("127.0.0.1", 9100)
    with closing(sink), exporters(EXPORTERS, 6667) as sources:
        sign_up({"name": "c", "streams": ["messages"], "port": 9100})
        for number in range(EXPORTERS * 4):
            sources[number % EXPORTERS].send(b"%d" % number)
        sink.settimeout(60)
        for _ in range(EXPORTERS * 4):
            sink.recv(100)
    services = reports(stack)
    received = [services[f"ingest.{number + 1}"]["stream/messages"]["received"] for number in range(4)]
    assert sum(received) == EXPORTERS * 4
    assert all(received)
    children = descendants(honcho.process.pid)
    assert len(children) == processes
    assert honcho.stop(signal.SIGTERM, 10) == 128 + signal.SIGTERM  # as honcho reports a signal of its own
    assert honcho.text.count("stopped (rc=0)") == processes, honcho.text
    assert not any(Path(f"/proc/{child}").exists() for child in children)


def test_one_that_ends_ends_all_under_honcho(stack: Stack) -> None:
    """Under honcho a worker killed takes the stack with it, as deploy/README.md says."""
    honcho = start_honcho(stack, "-c", "ingest=2", "broker", "ingest")
    for number in range(2):
        honcho.wait_for(f'"service": "ingest.{number + 1}"')
    announced = next(line for line in honcho.text.splitlines() if '"service": "ingest.2"' in line)
    os.kill(json.loads(announced[announced.index("{") :])["pid"], signal.SIGKILL)
    assert honcho.process.wait(60) != 0
    assert "ingest.2 stopped (rc=-9)" in honcho.text
    assert "broker.1 stopped (rc=0)" in honcho.text


class Flood(Background):
    """Sends numbered datagrams from many exporters until told to stop, at a rate that leaves buffers empty."""

    def __init__(self, sources: list[socket.socket]) -> None:
        super().__init__()
        self._sources = sources
        self.sent = 0

    def run(self) -> None:
        """Send rounds, each exporter once."""
        while not self.stopping.is_set():
            for exporter, sock in enumerate(self._sources):
                sock.send(exporter.to_bytes(2) + self.sent.to_bytes(4))
            self.sent += 1
            pause(0.01)


def test_killed_worker_loses_only_what_it_held(stack: Stack) -> None:
    """SIGKILL of one of four workers under load: each exporter has at most one gap, and the others go on.

    An exporter may go from one worker to another then: what the old one still has in its buffer can come later.
    """
    stack.start_all(ingest=4)
    sink, _ = open_receiver("127.0.0.1", 9100)
    with closing(sink), exporters(EXPORTERS, 6667) as sources:
        sign_up({"name": "c", "streams": ["messages"], "port": 9100})
        flood = Flood(sources)
        flood.start()
        wait_until(lambda: flood.sent > 50, "the flood runs")
        stack["ingest.2"].stop(signal.SIGKILL)
        at = flood.sent
        wait_until(lambda: flood.sent > at + 100, "the flood goes on")
        flood.stop()
        rounds = flood.sent
        came: dict[int, list[int]] = {number: [] for number in range(EXPORTERS)}
        sink.settimeout(2)
        try:
            while True:
                datagram = sink.recv(100)
                came[int.from_bytes(datagram[:2])].append(int.from_bytes(datagram[2:]))
        except TimeoutError:
            pass
    whole = 0
    for numbers in came.values():
        numbers.sort()
        gaps = [(low, high) for low, high in pairwise(numbers) if high != low + 1]
        assert numbers[0] == 0
        assert numbers[-1] == rounds - 1, "an exporter never came back"
        assert len(gaps) <= 1, gaps
        whole += not gaps
    assert whole >= EXPORTERS // 2, "exporters of the workers that lived lost datagrams"
    forwarder = reports(stack)["forwarder.1"]
    account = forwarder["collector/c"]
    assert account["sent"] == sum(map(len, came.values()))
    assert account["expected"] == account["sent"] + account.get("missed", 0)
