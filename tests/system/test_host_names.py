"""Collectors that the settings name by host: copies follow the name, and a resolver that is silent costs nothing."""

import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.name_server import NameServer, start_asking
from tests.stack import PATIENT, Stack, ask_json, sign_up, wait_until
from tests.traffic import pause

PORT, LISTEN = 9514, 7000
STREAM = f'[[stream]]\nname = "syslog"\nlisten = ["udp://127.0.0.1:{LISTEN}"]\n'
LISTENING = PATIENT + STREAM
SETTINGS = f"{PATIENT}resolve_seconds = 1\n{STREAM}" + "".join(
    f'[[collector]]\nname = "{name}"\nstreams = ["syslog"]\naddress = "{name}.example.net"\nport = {port}\n'
    for name, port in (("siem", PORT), ("loop", LISTEN), ("group", 9), ("nowhere", 9))
)
FIRST, SECOND = "127.0.0.2", "127.0.0.3"


@contextmanager
def receiving(address: str) -> Iterator[socket.socket]:
    """A socket where copies may come."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((address, PORT))
        sock.setblocking(False)
        yield sock


def count(sock: socket.socket, payload: bytes = b"x") -> int:
    """Return the number of datagrams of this payload that have come since the last call."""
    came = 0
    while True:
        try:
            came += sock.recv(100) == payload
        except BlockingIOError:
            return came


def send(times: int = 1, payload: bytes = b"x") -> None:
    """Send datagrams to the stream."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        for _ in range(times):
            sender.sendto(payload, ("127.0.0.1", LISTEN))


def wait_for(sock: socket.socket) -> None:
    """Send until a copy comes."""

    def came() -> bool:
        send()
        pause(0.05)
        return bool(count(sock))

    wait_until(came, f"copies come to {sock.getsockname()}")


def only_at(one: socket.socket, other: socket.socket) -> bool:
    """Send 5 datagrams that are no earlier ones, late; return whether one got them all, and the other nothing."""
    payload = os.urandom(16)
    send(5, payload)
    came = 0

    def all_came() -> bool:
        nonlocal came
        came += count(one, payload)
        return came >= 5

    wait_until(all_came, "five copies")
    pause(0.2)
    return (came + count(one, payload), count(other, payload)) == (5, 0)


def event_is(stack: Stack, event: str, **facts: object) -> Callable[[], bool]:
    """Return a question whether the gateway has logged an event with these facts."""
    return lambda: any(facts.items() <= line.items() for line in stack["gateway"].events(event))


def test_copies_follow_the_name(stack: Stack) -> None:
    """They go where the name leads, stay while it says nothing or still has the address, and move when it moves."""
    stack.configure(SETTINGS)
    names = {"siem": [FIRST], "loop": ["127.0.0.1"], "group": ["239.1.1.1"]}
    with NameServer() as server, receiving(FIRST) as first, receiving(SECOND) as second:
        server.addresses = {f"{name}.example.net": found for name, found in names.items()}
        stack.start("broker")
        start_asking(stack, "gateway")
        stack.start("forwarder")
        stack.start("ingest")
        wait_for(first)
        _, shown, _ = stack.run("clients")
        assert f"{FIRST} (siem.example.net)" in shown
        refused = "host name leads to an address that is refused"
        for name, reason in (("loop", "fanwire's own listeners"), ("group", "not the address of one host")):
            (said,) = [line for line in stack["gateway"].events(refused) if line["of"] == name]
            assert reason in said["reason"]
        unanswered = "host name has no answer"
        assert event_is(stack, unanswered, of="nowhere.example.net", kept={"nowhere": None})()
        assert set(ask_json({"op": "list"})["clients"]) == {"siem"}

        server.silent, before = True, server.asked
        wait_until(lambda: server.asked > before + 3, "questions that nobody answers")
        assert ask_json({"op": "list"})["clients"]["siem"]["address"] == FIRST
        wait_until(
            event_is(stack, unanswered, of="siem.example.net", kept={"siem": FIRST}), lambda: stack["gateway"].text
        )
        assert stack["gateway"].stop() == 0
        start_asking(stack, "gateway")  # the registry has the address
        wait_for(first)

        server.addresses["siem.example.net"] = [SECOND, FIRST]
        server.silent, before = False, server.asked
        wait_until(lambda: server.asked > before + 8, "answers")
        wait_until(
            event_is(stack, "host name has an answer again", of="siem.example.net"), lambda: stack["gateway"].text
        )
        assert only_at(first, second)
        generation = ask_json({"op": "list"})["clients"]["siem"]["generation"]
        server.addresses["siem.example.net"] = [SECOND, "127.0.0.4"]
        wait_for(second)
        assert only_at(second, first)
        assert event_is(stack, "host name has another address", of="siem", address=SECOND, before=FIRST)()
        entry = ask_json({"op": "list"})["clients"]["siem"]
        assert entry["generation"] > generation
        assert (entry["address"], entry["host"]) == (SECOND, "siem.example.net")


def test_silent_resolver_holds_up_no_reload_and_nothing_else(stack: Stack) -> None:
    """A stream is new, its listener has a name, and nobody answers: gateway and journal do their work, copies go on.

    The answer comes while they still wait for it. The listener is opened then, and a collector there is removed.
    """
    before = f'{LISTENING}journal = true\n[journal]\ndirectory = "{stack.directory}/journal"\n'
    fresh = '[[stream]]\nname = "fresh"\nlisten = ["udp://fresh.example.net:7001"]\njournal = true\n'
    stack.configure(before)
    with NameServer() as server, receiving("127.0.0.1") as siem:
        server.addresses = {"fresh.example.net": ["127.0.0.5"]}
        stack.start("broker")
        for name in ("gateway", "ingest", "journal"):
            start_asking(stack, name, patience_seconds=30)
        stack.start("forwarder")
        sign_up({"name": "siem", "streams": ["syslog"], "port": PORT})
        sign_up({"name": "loop", "streams": ["syslog"], "address": "127.0.0.5", "port": 7001})
        server.silent = True
        stack.configure(before + fresh)
        for name in ("gateway", "journal", "ingest"):
            asked = server.asked
            stack[name].process.send_signal(signal.SIGHUP)
            wait_until(lambda asked=asked: server.asked > asked, f"{name} asks")  # type: ignore[misc]
        wait_for(siem)
        assert set(ask_json({"op": "list"})["clients"]) == {"siem", "loop"}
        wait_until(lambda: stack["journal"].reloads, "the journal has read the settings")
        assert not stack["ingest"].reloads
        server.answer_late()
        wait_until(lambda: stack["ingest"].reloads, "the worker has the answer")
        assert stack["ingest"].reloads[0]["event"] == "reloaded"
        wait_until(lambda: set(ask_json({"op": "list"})["clients"]) == {"siem"}, "the gateway has the answer")


@pytest.mark.parametrize("name", ["uplink", "gateway"])
def test_silent_resolver_holds_up_no_end(stack: Stack, name: str) -> None:
    """A service that looks for its NATS server ends at SIGTERM, before the resolver has given up."""
    stack.configure(
        f'{LISTENING}[uplink]\nsite = "a"\nsend = ["syslog"]\nregistry = "shared"\nplain_beyond_loopback = true\n'
        'servers = ["nats://nats.example.net:4222"]\n'
    )
    with NameServer() as server:
        server.silent = True
        stack.start("broker")
        start_asking(stack, name, patience_seconds=30)
        wait_until(lambda: server.asked, "it asks")
        assert stack[name].stop(seconds=15) == 0
