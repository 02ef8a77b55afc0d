"""Thousands of the gateway's clients in a process of their own, so that their CPU is not the test's nor the gateway's.

What they find goes to stdout: a word when all are there, and a line of JSON in the end.
"""

import json
import os
import resource
import select
import socket
import sys
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import numpy as np

TTL_SECONDS: Final = 30.0
RENEW_SECONDS: Final = 10.0
"""Seconds between renewals, as in `fanwire collect`."""
PER_ADDRESS: Final = 1000
"""Connections from each address of loopback, fewer than the gateway allows; an address has some 28,000 ports."""
QUIET_SECONDS: Final = 20.0
"""Seconds of quiet after which the wait is over."""
SLOW_LINE: Final = b'{"op":"list"' + b" " * 3600


def connect(network: int, number: int) -> socket.socket:
    """A connection from the address that the client of that number has in 127.0.NETWORK.0/24."""
    source = (f"127.0.{network}.{1 + number // PER_ADDRESS}", 0)
    return socket.create_connection(("127.0.0.1", 5000), 60, source)


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """The median, the 99th percentile and the largest, in ms."""
    found = np.percentile(seconds, [50, 99, 100]) * 1000
    return {name: round(float(each), 2) for name, each in zip(("p50", "p99", "max"), found, strict=True)}


class Turns:
    """Turns of a crowd: each of `count` has one every `period` seconds, evenly spread."""

    def __init__(self, count: int, period: float) -> None:
        self._count, self._interval = count, period / count
        self._begin, self._taken = time.monotonic(), 0

    def due(self) -> Iterator[int]:
        """The numbers of those whose turn has come."""
        passed = int((time.monotonic() - self._begin) / self._interval)
        yield from (turn % self._count for turn in range(self._taken, passed))
        self._taken = passed


def renew(count: int, seconds: float) -> dict[str, Any]:
    """Sign up so many collectors, each on a connection that it keeps; renew their leases; return how that went."""
    connections = [connect(1, number) for number in range(count)]
    begin = time.monotonic()
    terms = {"op": "register", "streams": ["*"], "ttl": TTL_SECONDS, "hold": True}
    for number, connection in enumerate(connections):
        connection.sendall(
            json.dumps(terms | {"name": f"c{number}", "port": 20_000 + number % PER_ADDRESS}).encode() + b"\n"
        )
    generations = [json.loads(connection.recv(65536))["client"]["generation"] for connection in connections]
    print(f"{count} signed up in {time.monotonic() - begin:.1f} s", flush=True)
    lines = [b'{"op":"renew","name":"c%d","generation":%d}\n' % each for each in enumerate(generations)]
    numbers = {connection.fileno(): number for number, connection in enumerate(connections)}
    waiting: dict[int, float] = {}
    took: list[float] = []
    wrong: list[str] = []
    poll, turns, until = select.epoll(), Turns(count, RENEW_SECONDS), time.monotonic() + seconds
    for connection in connections:
        poll.register(connection, select.EPOLLIN)
    while time.monotonic() < until or waiting:
        for number in turns.due() if time.monotonic() < until else ():
            waiting[number] = time.monotonic()
            connections[number].sendall(lines[number])
        for descriptor, _ in poll.poll(0.002):
            number = numbers[descriptor]
            answer = connections[number].recv(65536)
            took.append(time.monotonic() - waiting.pop(number))
            if not answer.startswith(b'{"ok":true,"expires_in":'):
                wrong.append(answer.decode())
    return {"renewals": len(took), "wrong": wrong, "answer_ms": percentiles(took)}


def drip(count: int, seconds: float) -> dict[str, Any]:
    """Send a byte a second on each of so many connections, opened anew when they are closed; return what was said."""
    connections = [connect(2, number) for number in range(count)]
    numbers = {connection.fileno(): number for number, connection in enumerate(connections)}
    sent, answers, told = [0] * count, [b""] * count, Counter[str]()
    poll, turns, until = select.epoll(), Turns(count, 1.0), time.monotonic() + seconds
    for connection in connections:
        poll.register(connection, select.EPOLLIN)
    print(f"{count} drip", flush=True)
    while time.monotonic() < until:
        for number in turns.due():
            connections[number].send(SLOW_LINE[sent[number] :][:1])
            sent[number] += 1
        for descriptor, _ in poll.poll(0.002):
            number = numbers[descriptor]
            came = connections[number].recv(65536)
            answers[number] += came
            if came:
                continue
            told[json.loads(answers[number])["error"]] += 1
            del numbers[descriptor]
            connections[number].close()
            connections[number] = connect(2, number)
            sent[number], answers[number] = 0, b""
            numbers[connections[number].fileno()] = number
            poll.register(connections[number], select.EPOLLIN)
    return {"told": told}


class Told:
    """Lines that every watcher gets, as the first got them; for each event its end, and the time of its cause, ns."""

    def __init__(self) -> None:
        self.text = bytearray()
        self.ends: list[int] = []
        self.caused: list[int] = []

    def agrees(self, at: int, came: bytes) -> bool:
        """Return whether `came`, read behind `at` bytes, matches the others; the first one sets it."""
        known = self.text[at : at + len(came)]
        if not came or not came.startswith(known):
            return False
        self.text += came[len(known) :]
        begin = self.ends[-1] if self.ends else 0
        while end := self.text.find(b"\n", begin) + 1:
            self.caused.append(int(json.loads(self.text[begin:end])["client"]["name"].partition("-")[0]))
            self.ends.append(end)
            begin = end
        return True


def watch(count: int, events: int) -> dict[str, Any]:
    """Watch with so many connections until so many events have come to each; return how late they came.

    Each is that a client has joined, named after the moment when it asked for that, in ns of the monotonic clock.
    """
    connections = [connect(1, number) for number in range(count)]
    for connection in connections:
        connection.sendall(b'{"op":"watch"}\n')
    (begun,) = {json.loads(connection.recv(65536))["revision"] for connection in connections}
    poll, told, took, wrong = select.epoll(), Told(), array("d"), 0
    at, seen = ({connection.fileno(): 0 for connection in connections} for _ in range(2))
    for connection in connections:
        poll.register(connection, select.EPOLLIN)
    print(f"{count} watch", flush=True)
    while len(took) < count * events and (ready := poll.poll(QUIET_SECONDS)):
        for each, _ in ready:
            came, now = os.read(each, 65536), time.monotonic_ns()
            if not told.agrees(at[each], came):
                wrong += 1
                poll.unregister(each)
                continue
            at[each] += len(came)
            while seen[each] < len(told.ends) and told.ends[seen[each]] <= at[each]:
                took.append((now - told.caused[seen[each]]) / 1e9)
                seen[each] += 1
    revisions = [json.loads(line)["revision"] - begun for line in told.text.splitlines()]
    return {
        "seen": len(took),
        "wrong": wrong,
        "in_order": revisions == list(range(1, events + 1)),
        "seen_ms": percentiles(took),
    }


def main() -> None:
    """Be the crowd that the arguments say."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    kinds: dict[str, Callable[..., dict[str, Any]]] = {"renew": renew, "drip": drip, "watch": watch}
    kind, *numbers = sys.argv[1:]
    print(json.dumps(kinds[kind](*map(int, numbers))), flush=True)


if __name__ == "__main__":
    main()
