"""Thousands of clients at once, by real connections on loopback; the figures are printed beside what they should be.

The settings raise what is bounded for less: `max_connections`, which the limit of open files (`ulimit -n`) bounds too.
The clients have several addresses, so that `max_connections_per_address` and `requests_per_second` are as they are.
"""

import json
import resource
import socket
import sys
import time
from typing import Any

import pytest

from tests.stack import Running, Stack, ask_json

COLLECTORS, SLOW, WATCHERS = 10_000, 1000, 2000
EVENTS, EVENTS_PER_SECOND = 400, 10


def start(stack: Stack, more: str = "") -> Running:
    """A gateway that may have some more connections than there will be, and the broker it needs."""
    most = COLLECTORS + 2 * SLOW
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < most + 1000:
        pytest.skip(f"needs {most + 1000} open files, which `ulimit -Hn` does not allow")
    stack.configure(f"[gateway]\nmax_connections = {most}\n{more}")
    stack.start("broker")
    return stack.start("gateway")


def crowd(stack: Stack, kind: str, *numbers: int) -> Running:
    """Start so many clients in a process of their own."""
    return stack.spawn(kind, [sys.executable, "-m", "tests.services.gateway.crowd", kind, *map(str, numbers)])


def outcome(clients: Running) -> dict[str, Any]:
    """Return the clients' results, once they are done."""
    assert clients.process.wait(600) == 0, clients.text
    found: dict[str, Any] = json.loads(clients.text.splitlines()[-1])
    return found


@pytest.mark.soak
def test_ten_thousand_leases_beside_slow_clients(stack: Stack) -> None:
    """Every renewal of 10,000 collectors is granted, while 1,000 clients that send a byte a second are sent away."""
    gateway = start(stack)
    stack.start("forwarder")
    collectors = crowd(stack, "renew", COLLECTORS, 90)
    collectors.wait_for("signed up", 300)
    before = ask_json({"op": "list"})
    slow = crowd(stack, "drip", SLOW, 70)
    slow.wait_for("drip", 100)
    began, worked = time.monotonic(), gateway.cpu_seconds()
    told = outcome(slow)["told"]
    share = (gateway.cpu_seconds() - worked) / (time.monotonic() - began)
    after, found = ask_json({"op": "list"}), outcome(collectors)
    print(
        f"{collectors.text.splitlines()[0]}; {found['renewals']} renewals, answered in {found['answer_ms']} (p99 under "
        f"50 ms); {told} of {SLOW} slow clients; {share:.1%} of a core (under 25 %), "
        f"{gateway.resident_mb('VmHWM'):.0f} MB (under 150)"
    )
    assert found["wrong"] == []
    assert found["renewals"] > 7 * COLLECTORS
    assert told.keys() == {"too_slow"}
    assert told["too_slow"] >= 5 * SLOW
    assert (after["revision"], len(after["clients"])) == (before["revision"], COLLECTORS)
    assert "Traceback" not in gateway.text


@pytest.mark.soak
def test_two_thousand_watchers(stack: Stack) -> None:
    """Of 2,000 watchers all see every event once and in order but one that never reads, who is told `too_slow`."""
    gateway = start(stack, "output_buffer = 65536\nrequest_seconds = 60\n")
    with socket.socket() as deaf, socket.create_connection(("127.0.0.1", 5000), 60) as actor:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.settimeout(60)
        deaf.connect(("127.0.0.1", 5000))
        deaf.sendall(b'{"op":"watch"}\n')
        watchers = crowd(stack, "watch", WATCHERS - 1, EVENTS)
        watchers.wait_for("watch", 100)
        terms = {"op": "register", "from": [f"10.0.{number}.0/24" for number in range(64)]}
        began, worked = time.monotonic(), gateway.cpu_seconds()
        for number in range(EVENTS):
            time.sleep(max(0.0, began + number / EVENTS_PER_SECOND - time.monotonic()))
            actor.sendall(json.dumps(terms | {"name": f"{time.monotonic_ns()}-{number}"}).encode() + b"\n")
            assert json.loads(actor.recv(65536))["ok"]
        share = (gateway.cpu_seconds() - worked) / (time.monotonic() - began)
        found = outcome(watchers)
        lines = b"".join(iter(lambda: deaf.recv(65536), b"")).splitlines()
    print(
        f"{found['seen']} events seen after {found['seen_ms']} (p99 under 100 ms) at {EVENTS_PER_SECOND}/s; "
        f"{share:.1%} of a core, {gateway.resident_mb('VmHWM'):.0f} MB"
    )
    assert (found["seen"], found["wrong"], found["in_order"]) == ((WATCHERS - 1) * EVENTS, 0, True)
    listed, *events, last = map(json.loads, lines)
    assert [event["revision"] for event in events] == [listed["revision"] + number + 1 for number in range(len(events))]
    assert last["error"] == "too_slow"
