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
from tests.stack import PATIENT, Stack, ask, sign_up, wait_until
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


def send(stream_port: int, sinks: Sinks, *expected: int) -> None:
    """Send 50 datagrams to a stream, twice: so many in all come to the sinks, and no more.

    What the second half brings anywhere shows that all of the first half has been sent on.
    """
    before = {port: sinks.count(port) for port in sinks.came}
    with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as sender:
        for half in (1, 2):
            for number in range(50):
                sender.sendto(b"%d" % number, ("127.0.0.1", stream_port))
            for (port, had), most in zip(before.items(), expected, strict=True):
                wait_until(lambda: sinks.count(port) >= had + half * most // 2, f"copies come to {port}")  # noqa: B023
    assert [sinks.count(port) - had for port, had in before.items()] == list(expected)


@pytest.fixture
def site(stack: Stack) -> Stack:
    """A relay with two tenants, red and blue."""
    stack.configure(PATIENT + entry("red", "collect", "list") + entry("blue", "collect", "list") + STREAM)
    stack.start_all()
    sign_up({"name": "first", "streams": ["messages"], "port": 9})  # from then on the gateway knows the forwarder
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


SECOND = '[[stream]]\nname = "secret"\nlisten = ["udp://127.0.0.1:6668"]\n'
LOCAL = '[[collector]]\nname = "all"\nstreams = ["*"]\naddress = "127.0.0.1"\nport = 9000\n'


@pytest.mark.parametrize("by", ["restart", "reload"])
def test_what_a_token_no_longer_allows_ends(stack: Stack, by: str) -> None:
    """With its token go an entry and an open connection, with a stream its copies: by restart and by reload alike."""

    def configure(*tokens: str) -> None:
        stack.configure("".join((PATIENT, *tokens, STREAM, SECOND, LOCAL)))

    blue = entry("blue", "collect", "list")
    configure(entry("red", "collect", "list"), blue)
    stack.start_all()
    with closing(Sinks(9000, 9001, 9002)) as sinks, socket.create_connection(("127.0.0.1", 5000), 30) as watcher:
        assert ask_as("red", collector("red", 9001, streams=["*"]))[0]["client"]["health"] == "ok"
        assert ask_as("blue", collector("blue", 9002, streams=["*"]))[0]["client"]["health"] == "ok"
        watcher.sendall(b'{"op":"auth","token":"secret blue"}\n{"op":"watch"}\n')
        lines = watcher.makefile("rb")
        assert [json.loads(lines.readline())["ok"] for _ in range(2)] == [True, True]
        for port in (6667, 6668):
            send(port, sinks, 100, 100, 100)
        configure(entry("red", "collect", "list", streams=["messages"]))
        gateway = stack["gateway"]
        if by == "restart":
            assert gateway.stop() == 0
            gateway = stack.start("gateway")
        else:
            assert gateway.reload()["event"] == "reloaded"
            assert lines.read().endswith((b"", b"\n"))  # to its end
        lines.close()
        assert ask_as("", {"op": "auth", "token": "secret blue"})[0]["error"] == "not_permitted"
        # A client that signs up now is served after the gateway has removed the others.
        assert ask_as("", collector("here", 9009))[0]["client"]["health"] == "ok"
        listed = ask_as("", {"op": "list"})[0]["clients"]
        assert {name: client["streams"] for name, client in listed.items()} == {
            "all": ["*"], "red": ["messages"], "here": ["messages"],
        }  # fmt: skip
        send(6667, sinks, 100, 100, 0)
        send(6668, sinks, 100, 0, 0)
        events = [line["event"] for line in gateway.log if str(line.get("event")).startswith("client ")]
        assert len(events) == 2, events
