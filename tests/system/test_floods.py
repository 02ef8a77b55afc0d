"""Floods of any input, as fast as can be: their cost is limited, in memory, descriptors, disk and lines of log."""

import json
import random
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import zmq

from shared.bus.endpoint import ipc_endpoint
from shared.process.log_limit import LINES_AT_ONCE
from tests.stack import Stack, ask, sign_up, wait_until
from tests.system.test_bad_input import garbage

SECONDS = 1.0
MOST_MB = {"gateway": 60}
"""By how much a process may grow, others by 300: full queues of the bus, and the memory that payloads are lent in."""
RESET = b"\1\0\0\0\0\0\0\0"
"""For SO_LINGER: closing sends a reset at once."""
UNROUTED = "198.51.100.7"
SETTINGS = f"""
[gateway]
destinations = ["{UNROUTED}/32"]
requests_per_second = 100000
[[stream]]
name = "messages"
listen = ["udp://127.0.0.1:6667", "tcp://127.0.0.1:6667"]
reply = "Got your message!"
"""
Flood = Callable[[Stack, random.Random], None]


def talk(port: int, text: bytes) -> None:
    """Say something to a TCP listener and break the connection off."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection, suppress(ConnectionError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        connection.sendall(text)
        connection.recv(100)


def ask_for_nonsense(_: Stack, draw: random.Random) -> None:
    """Send the gateway what is no request."""
    browser = b"POST / HTTP/1.1\r\nHost: x\r\n\r\n"
    talk(5000, draw.choice([browser, b"\xff\xfe", b'{"op":' + b"[" * 30_000 + b"\n", b"{}\n" * 100, b"n" * 300_000]))


def come_and_go(_: Stack, draw: random.Random) -> None:
    """Let the forwarder meet collectors that no route leads to, and lose them again."""
    names = [f"{draw.getrandbits(60):x}" for _ in range(50)]
    client = {"op": "register", "streams": ["*"], "address": UNROUTED}
    wishes = (client | {"name": name, "port": port} for port, name in enumerate(names, 9))
    granted = ask(b"".join(json.dumps(wish).encode() + b"\n" for wish in wishes)).splitlines()
    leave = ({"op": "leave", "name": name, "generation": json.loads(answer)["client"]["generation"]}
             for name, answer in zip(names, granted, strict=True))  # fmt: skip
    ask(b"".join(json.dumps(each).encode() + b"\n" for each in leave))


def break_off(_: Stack, draw: random.Random) -> None:
    """Send a stream's TCP listener beginnings of messages, and counts that nobody means."""
    with socket.create_connection(("127.0.0.1", 6667), timeout=60) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        connection.sendall(draw.choice([b"x" * 200_000, b"99999999999 <1>", b"17 <34>", b"\n" * 1000]))


def send_datagrams(_: Stack, draw: random.Random) -> None:
    """Send what a reader of payloads would choke on, from many ports."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        for _number in range(50):
            sender.sendto(draw.choice([b"", b"%s%n\0", b"[" * 60_000, draw.randbytes(1000)]), ("127.0.0.1", 6667))


def publish_garbage(stack: Stack, draw: random.Random) -> None:
    """Put garbage on every topic of the bus, and subscribe to topics that nobody has."""
    with zmq.Context() as context, context.socket(zmq.XPUB) as mouth, context.socket(zmq.SUB) as ears:
        for sock in (mouth, ears):
            sock.setsockopt(zmq.LINGER, 0)
        ears.subscribe(draw.randbytes(300))
        ears.connect(ipc_endpoint(stack.bus, "subscribe"))
        mouth.connect(ipc_endpoint(stack.bus, "publish"))
        mouth.recv()
        for _ in range(50):
            mouth.send_multipart(garbage(draw))


@pytest.mark.parametrize("flood", [ask_for_nonsense, come_and_go, break_off, send_datagrams, publish_garbage])
def test_flood_has_bounds(stack: Stack, flood: Flood) -> None:
    """Under a flood every process stays, with its threads; memory, descriptors, files and log grow by little."""
    stack.configure(SETTINGS)
    stack.start_all()
    sign_up({"name": "fine", "streams": ["*"], "port": 9514})
    draw = random.Random(1)
    flood(stack, draw)

    def costs(kind: str) -> dict[str, int]:
        return {each.name: len(list(Path(f"/proc/{each.process.pid}/{kind}").iterdir())) for each in stack.running}

    threads, descriptors = costs("task"), costs("fd")
    lines = {each.name: len(each.text.splitlines()) for each in stack.running}
    memory = {each.name: each.forget_peak() for each in stack.running}
    began, turns = time.monotonic(), 0
    while time.monotonic() - began < SECONDS or turns <= 5:  # a busy machine takes longer for as many
        flood(stack, draw)
        turns += 1
    wait_until(lambda: all(count <= descriptors[name] + 3 for name, count in costs("fd").items()), "they are closed")
    passed = time.monotonic() - began
    assert costs("task") == threads
    for each in stack.running:
        assert each.process.poll() is None, each.text
        assert "Traceback" not in each.text
        assert each.resident_mb("VmHWM") - memory[each.name] < MOST_MB.get(each.name, 300), each.name
        assert len(each.text.splitlines()) - lines[each.name] <= LINES_AT_ONCE + 4 * passed, each.text
    assert sum(path.stat().st_size for path in stack.bus.iterdir()) < 20_000_000
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sink,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender,
    ):
        sink.bind(("127.0.0.1", 9514))
        sink.settimeout(0.5)

        def copied() -> bool:
            sender.sendto(b"still here", ("127.0.0.1", 6667))
            with suppress(TimeoutError):
                while sink.recv(70_000) != b"still here":
                    pass
                return True
            return False

        wait_until(copied, "copies flow")
