import json
import random
import signal
import socket
import time
from typing import Any

import pytest

from tests.background import Background
from tests.stack import PATIENT, Stack, ask_json, wait_until
from tests.traffic import CheckingCollector, payload

CLIENTS = 4
LARGEST = 200
PACE_SECONDS = 0.005


class Registrar(Background):
    """Registers names of its own and lets some go, for ever anew, and keeps what was answered `ok`."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self._draw = random.Random(number)
        self.prefix = f"r{number}-"
        self.granted: dict[str, int] = {}
        self.undecided: set[str] = set()
        """Names whose last request was never answered: either outcome is right."""
        self.answers = 0
        self.generations: list[int] = []

    def run(self) -> None:
        """Talk, and connect again whenever the gateway has gone."""
        while not self.stopping.is_set():
            try:
                with socket.create_connection(("127.0.0.1", 5000), timeout=60) as connection:
                    lines = connection.makefile("rb")
                    with lines:
                        while not self.stopping.is_set():
                            self._talk(connection, lines)
            except (OSError, EOFError):
                time.sleep(0.01)

    def _talk(self, connection: socket.socket, lines: Any) -> None:
        name = f"{self.prefix}{self._draw.randrange(100)}"
        leaving = name in self.granted and name not in self.undecided and self._draw.random() < 0.5
        request: dict[str, Any] = {"op": "leave" if leaving else "register", "name": name}
        request |= {"generation": self.granted[name]} if leaving else {"take_over": True}
        self.undecided.add(name)
        connection.sendall(json.dumps(request).encode() + b"\n")
        line = b'{"event":'
        while line.startswith(b'{"event"'):  # our own earlier connection's, and ours by take_over
            line = lines.readline()
        if not line.endswith(b"\n"):
            raise EOFError
        answer = json.loads(line)
        assert answer["ok"], answer
        self.undecided.discard(name)
        self.answers += 1
        if leaving:
            del self.granted[name]
        else:
            self.granted[name] = answer["client"]["generation"]
            self.generations.append(self.granted[name])


class Exporter(Background):
    """Sends numbered datagrams at a steady pace."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = 0

    def run(self) -> None:
        """Send."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.connect(("127.0.0.1", 6667))
            while not self.stopping.wait(PACE_SECONDS):
                sender.send(payload(1, self.sent, LARGEST))
                self.sent += 1


@pytest.mark.parametrize("kills", [5, pytest.param(200, marks=pytest.mark.soak)])
def test_killed_under_load(stack: Stack, kills: int) -> None:
    """All that was answered still holds after a SIGKILL, and copies to earlier collectors go on without a gap."""
    stack.configure(PATIENT + '[[stream]]\nname = "messages"\nlisten = ["udp://127.0.0.1:6667"]\n')
    stack.start_all()
    collector = CheckingCollector(stack, "127.0.0.1", 9514, LARGEST)
    assert ask_json({"op": "register", "name": "siem", "streams": ["*"], "port": 9514})["client"]["health"] == "ok"
    registrars, exporter = [Registrar(number) for number in range(CLIENTS)], Exporter()
    draw, revision = random.Random(7), 0
    exporter.start()
    try:
        for _ in range(kills):
            working = [Registrar(number) for number in range(CLIENTS)]
            for each, former in zip(working, registrars, strict=True):
                each.granted, each.undecided = former.granted, former.undecided
                each.answers, each.generations = former.answers, former.generations
                each.start()
            registrars = working
            time.sleep(draw.uniform(0.02, 0.3))
            stack["gateway"].stop(signal.SIGKILL)
            for each in registrars:
                each.stop()
            stack.start("gateway")
            listed = ask_json({"op": "list"})
            found = {name: client["generation"] for name, client in listed["clients"].items()}
            assert listed["revision"] >= revision
            revision = listed["revision"]
            assert "siem" in found
            for each in registrars:
                mine = {name for name in found if name.startswith(each.prefix)}
                assert mine - each.undecided == each.granted.keys() - each.undecided
                for name in mine - each.undecided:
                    assert found[name] == each.granted[name]
    finally:
        exporter.stop()
        for each in registrars:
            each.stop()
    generations = [generation for each in registrars for generation in each.generations]
    assert len(set(generations)) == len(generations) > 0
    wait_until(lambda: collector.received == exporter.sent, f"all {exporter.sent}, {collector.received} came")
    assert collector.wrong == 0
    print(
        f"{kills} kills: {sum(each.answers for each in registrars)} answers kept, {exporter.sent} datagrams delivered"
    )
