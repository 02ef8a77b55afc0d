"""A history of operations on a registry, by clients of several nodes at once, and its check for lost and stale answers.

After Jepsen: what was answered `ok` must have happened between its call and its answer. What was answered
`unavailable`, or not at all, may have happened then, later or never.
"""

import json
import random
import socket
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from threading import Event, Lock, Thread
from typing import Any, Final

from tests.services.gateway.cluster.nodes import Node

ANSWER_SECONDS: Final = 15.0


@dataclass
class Call:
    """One operation; `end` is infinite until there is an answer that says what happened."""

    op: str
    name: str
    node: str
    begin: float
    generation: int = 0
    take_over: bool = False
    end: float = float("inf")
    word: str = "unknown"
    """`ok`, the word of a refusal, or `unknown`."""

    @property
    def ok(self) -> bool:
        """True where it was answered `ok`."""
        return self.word == "ok"

    @property
    def possible(self) -> bool:
        """True where it may have happened."""
        return self.word in ("ok", "unknown")


@dataclass
class History:
    """All calls."""

    calls: list[Call] = field(default_factory=list)
    lock: Lock = field(default_factory=Lock)

    def add(self, call: Call) -> None:
        """Note a call."""
        with self.lock:
            self.calls.append(call)

    def of(self, name: str, op: str) -> list[Call]:
        """Return the calls of one kind about a name."""
        return [call for call in self.calls if call.name == name and call.op == op]


class Client(Thread):
    """A client that asks one node after the other, by a connection of its own each time, until it is told to stop."""

    def __init__(self, history: History, nodes: Sequence[Node], names: Sequence[str], seed: int, stop: Event) -> None:
        super().__init__(daemon=True)
        self._history = history
        self._nodes = nodes
        self._names = names
        self._random = random.Random(seed)
        self._stopped = stop
        self._known: dict[str, int] = {}

    def run(self) -> None:
        """Ask."""
        while not self._stopped.is_set():
            node, name = self._random.choice(self._nodes), self._random.choice(self._names)
            op = self._random.choice(("register", "register", "renew", "renew", "leave", "list"))
            if op == "list":
                self._list(node)
                continue
            if op != "register" and name not in self._known:
                continue
            call = Call(op, name, node.name, time.monotonic(), self._known.get(name, 0))
            if op == "register":
                call.generation, call.take_over = 0, self._random.random() < 0.6
            self._history.add(call)
            self._make(call, node)
            time.sleep(self._random.uniform(0, 0.02))

    def _make(self, call: Call, node: Node) -> None:
        request: dict[str, Any] = {"op": call.op, "name": call.name}
        request |= {"take_over": call.take_over} if call.op == "register" else {"generation": call.generation}
        answer = _ask(request, node.gateway)
        if answer is None or answer.get("error") == "unavailable":
            return
        if answer["ok"] and call.op == "register":
            call.generation = self._known[call.name] = answer["client"]["generation"]
        elif call.op == "leave":
            del self._known[call.name]
        call.word, call.end = answer.get("error", "ok"), time.monotonic()

    def _list(self, node: Node) -> None:
        if answer := _ask({"op": "list"}, node.gateway):
            for name, client in answer["clients"].items():
                if self._random.random() < 0.3:
                    self._known[name] = client["generation"]


def _ask(request: dict[str, Any], port: int) -> dict[str, Any] | None:
    """Return the answer; None where there is none."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=ANSWER_SECONDS) as connection:
            connection.sendall(json.dumps(request).encode() + b"\n")
            connection.shutdown(socket.SHUT_WR)
            answer: dict[str, Any] = json.loads(b"".join(iter(lambda: connection.recv(65536), b"")))
            return answer
    except (OSError, ValueError):
        return None


def faults(history: History, names: Iterable[str], last: dict[str, int]) -> list[str]:
    """Return what contradicts the answers; `last` has the generation of each name that is there at the end."""
    found = []
    for name in names:
        found += _faults_of(history, name, last.get(name, 0))
    return found


def _faults_of(history: History, name: str, last: int) -> list[str]:
    found = []
    made = sorted((call for call in history.of(name, "register") if call.ok), key=lambda call: call.generation)
    unsure = [call for call in history.of(name, "register") if call.word == "unknown"]
    leaves = [call for call in history.of(name, "leave") if call.possible]
    for earlier, later in pairwise(made):
        if earlier.generation == later.generation:
            found.append(f"one generation for two: {earlier}, {later}")
        if later.end < earlier.begin:
            found.append(f"generations against time: {earlier}, {later}")
        left = any(each.generation == earlier.generation and each.begin < later.end for each in leaves)
        between = any(each.begin < later.end for each in unsure)
        if not later.take_over and not left and not between:
            found.append(f"a name given twice: {earlier}, {later}")
    for call in (*history.of(name, "renew"), *history.of(name, "leave")):
        if not call.ok:
            continue
        ended = [each for each in made if each.generation > call.generation and each.end < call.begin]
        ended += [
            each
            for each in leaves
            if each.ok and each is not call and each.generation == call.generation and each.end < call.begin
        ]
        found += [f"stale ok: {call} after {each}" for each in ended]
    if made:
        newest = made[-1]
        leaving = [each for each in leaves if each.generation == newest.generation]
        if last < newest.generation and not (last == 0 and (leaving or (unsure and leaves))):
            found.append(f"lost: {newest}, and {last} is there at the end")
        if last > newest.generation and not unsure:
            found.append(f"nobody asked for {last}, which is there at the end; the newest is {newest}")
        if last == newest.generation and any(each.ok for each in leaving):
            found.append(f"there again: {newest}, which has left")
    return found
