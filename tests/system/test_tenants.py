"""Tenants are apart: whatever one of them asks for, another's copies are counted at its own sockets, and are all there.

Tokens work on loopback too, where a connection that has shown one has its holder's rights only.
"""

import json
import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing
from typing import Any

import pytest

from tests.services.gateway.transport.test_tls import entry
from tests.stack import PATIENT, Stack, ask, wait_until
from tests.traffic import open_receiver

STREAM = '[[stream]]\nname = "messages"\nlisten = ["udp://127.0.0.1:6667"]\n'
EXPORTERS = [f"127.0.1.{number}" for number in range(1, 41)]
EACH = 50


def ask_as(holder: str, *requests: dict[str, Any]) -> list[dict[str, Any]]:
    """The answers to requests of one connection, which shows the holder's token first; "": none."""
    shown = [{"op": "auth", "token": f"secret {holder}"}] if holder else []
    lines = [json.dumps(request).encode() + b"\n" for request in (*shown, *requests)]
    answers = [json.loads(line) for line in ask(b"".join(lines)).splitlines()]
    return [answer for answer in answers if "ok" in answer][len(shown) :]


def collector(name: str, port: int, **more: object) -> dict[str, Any]:
    """A request to sign up."""
    return {"op": "register", "name": name, "streams": ["messages"], "port": port, **more}


class Sinks:
    """Sockets that collect what comes to ports of this host, and count it."""

    def __init__(self, *ports: int) -> None:
        self._sockets = {port: open_receiver("127.0.0.1", port)[0] for port in ports}
        self.came: dict[int, Counter[bytes]] = {port: Counter() for port in ports}

    def count(self, *ports: int) -> int:
        """Return the datagrams that have come so far to these ports."""
        for port in ports:
            self._sockets[port].setblocking(False)
            self.came[port].update(self._waiting(port))
        return sum(self.came[port].total() for port in ports)

    def _waiting(self, port: int) -> Iterator[bytes]:
        while True:
            try:
                yield self._sockets[port].recv(100)
            except BlockingIOError:
                return

    def close(self) -> None:
        """Close the sockets."""
        for each in self._sockets.values():
            each.close()


def send_all() -> Counter[bytes]:
    """Send `EACH` datagrams of every exporter, and return what has been sent."""
    sent: Counter[bytes] = Counter()
    with ExitStack() as stack:
        for address in EXPORTERS:
            sender = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            sender.bind((address, 0))
            for number in range(EACH):
                payload = f"{address} {number}".encode()
                sender.sendto(payload, ("127.0.0.1", 6667))
                sent[payload] += 1
    return sent


@pytest.fixture
def site(stack: Stack) -> Stack:
    """A relay with two tenants, red and blue."""
    stack.configure(PATIENT + entry("red", "collect", "list") + entry("blue", "collect", "list") + STREAM)
    stack.start_all()
    return stack


@pytest.mark.usefixtures("site")
def test_nobody_takes_another_holders_share() -> None:
    """18 entries of another holder in a group of the same name take nothing of it: its two members share it all."""
    with closing(Sinks(9001, 9002, 9003)) as sinks:
        (first,) = ask_as("red", collector("red1", 9001, group="siem"))
        (second,) = ask_as("red", collector("red2", 9002, group="siem"))
        others = ask_as("blue", *(collector(f"blue{number}", 9003, group="siem") for number in range(18)))
        granted = [answer["client"] for answer in (first, second, *others)]
        assert [(client["group"], client["health"]) for client in granted] == [("siem", "ok")] * 20
        sent = send_all()
        wait_until(lambda: sinks.count(9001, 9002) >= sent.total(), "its own copies come", 30)
        wait_until(lambda: sinks.count(9003) >= sent.total(), "the others' come", 30)
        assert sinks.came[9001] + sinks.came[9002] == sent
        assert sinks.came[9003] == sent
        assert all(sinks.came.values())
