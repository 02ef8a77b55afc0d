"""The gateway under its ceiling: what thousands of connections leave waiting is bounded by the memory there is."""

import json
import resource
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from tests.services.gateway.talk import talk_to
from tests.services.gateway.test_server import counters
from tests.stack import Running, Stack, ask, ask_json, wait_until

CEILING = 80 << 20
CONNECTIONS = 1000


@pytest.fixture
def gateway(stack: Stack) -> Running:
    """A gateway with little memory, and the broker it needs."""
    stack.by_exec = True  # its memory is to be its own
    stack.configure(f"[gateway]\nmemory = {CEILING}\nrequest_seconds = 600\nmax_clients_per_holder = 10000\n")
    stack.start("broker")
    return stack.start("gateway")


@pytest.fixture
def opened() -> Iterator[ExitStack]:
    """Connections, which end with the test; there may be many."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1], limits[1]))
    with ExitStack() as everything:
        yield everything
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def connect(opened: ExitStack) -> socket.socket:
    """A connection whose own kernel takes little."""
    connection = opened.enter_context(socket.socket())
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(60)
    connection.connect(("127.0.0.1", 5000))
    return connection


def assert_bounded(stack: Stack, gateway: Running) -> None:
    """Some were cut, memory stayed below the ceiling, and others are served."""
    wait_until(lambda: counters(stack).get("cut_for_memory"), "some are cut")
    assert gateway.resident_mb("VmHWM") * 2**20 < CEILING
    assert b"other" in ask(b"other")


def test_unfinished_requests(stack: Stack, gateway: Running, opened: ExitStack) -> None:
    """A thousand that send most of a long line and no end of it: those are cut that would not fit."""
    for _ in range(CONNECTIONS):
        connect(opened).sendall(b'{"op":"register","name":"' + b"x" * 60_000)
    assert_bounded(stack, gateway)


def test_watchers_that_do_not_read(stack: Stack, gateway: Running, opened: ExitStack) -> None:
    """A thousand that watch and take nothing: those are cut that would not fit; who reads gets every event."""
    reader = talk_to()
    opened.callback(reader.close)
    since = reader.ask("watch")["revision"]
    for _ in range(CONNECTIONS):
        connect(opened).sendall(b'{"op":"watch"}\n')
    wait_until(lambda: counters(stack).get("watchers") == CONNECTIONS + 1, "all watch")
    changed = 0
    while not counters(stack).get("cut_for_memory"):
        lines: list[dict[str, Any]] = [
            {"op": "register", "name": f"{changed + number}" + "x" * 200, "ttl": 600} for number in range(100)
        ]
        answers = ask(b"".join(json.dumps(line).encode() + b"\n" for line in lines)).splitlines()
        assert [answer for answer in map(json.loads, answers) if not answer["ok"]] == []
        changed += len(lines)
        assert [event["revision"] for event in reader.follow(since + changed)] == list(
            range(since + changed - len(lines) + 1, since + changed + 1)
        )
    assert_bounded(stack, gateway)
    assert ask_json({"op": "list"})["revision"] >= since + changed
