"""The gateway, a real process that is killed at times, against a model of it that predicts every line it says."""

import contextlib
import copy
import json
import signal
import socket
import sys
from collections import deque
from itertools import count
from typing import ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from tests.services.gateway.clocked import START, Clock
from tests.services.gateway.model import MAX_CLIENTS, SETTINGS, Caller, Line, Model
from tests.services.gateway.test_server import read_all
from tests.services.gateway.transport.test_tls import entry
from tests.stack import Running, Stack

PLACES = (("127.0.0.1", ""), ("127.0.0.1", ""), ("127.0.0.2", "red"), ("127.0.0.1", "red"), ("127.0.0.2", "blue"))
"""Addresses that clients connect from, and their holders; each has one connection at a time."""
AUDITOR = -1
HOLDERS = "".join(entry(name, "collect", "list") for name in ("red", "blue"))
NOT_PREDICTED = {"message", "health", "health_since", "lost", "epoch"}

places = st.sampled_from(range(len(PLACES)))
names = st.sampled_from([f"n{number}" for number in range(MAX_CLIENTS + 2)])
ttls = st.sampled_from([0.0, 2.0, 5.0, 20.0])
registers = st.fixed_dictionaries(
    {"op": st.just("register"), "name": names, "ttl": ttls, "hold": st.booleans(), "take_over": st.booleans()},
    optional={"streams": st.just(["messages"]), "port": st.sampled_from([0, 0, 9514])},
)
of_entries = st.fixed_dictionaries(
    {"op": st.sampled_from(["renew", "renew", "leave"]), "name": names, "generation": st.sampled_from([0, 0, 0, -1, 1])}
)
orders = st.fixed_dictionaries({"op": st.sampled_from(["withhold", "release"]), "name": names})
requests = st.one_of(registers, of_entries, orders, st.just({"op": "list"}))
bursts = st.lists(requests, min_size=1, max_size=4) | st.builds(
    lambda request: [request | {"name": f"n{number}"} for number in range(MAX_CLIENTS)], registers
)


def predicted(line: Line) -> Line:
    """Return what the model knows of a line, and that it has a sentence where one is due."""
    if "error" in line:
        assert line["message"]
    kept = {key: value for key, value in line.items() if key not in NOT_PREDICTED}
    if kept.get("client"):
        kept["client"] = predicted(kept["client"])
    if "clients" in kept:
        kept["clients"] = {name: predicted(client) for name, client in kept["clients"].items()}
    return kept


class Conversation:
    """A connection, and what it is yet to be told without asking: `events` in their order, and lost names in theirs."""

    def __init__(self, caller: Caller, connection: socket.socket) -> None:
        self.caller, self.connection = caller, connection
        self._lines = connection.makefile("rb")
        self.events: deque[Line] = deque()
        self.lost: deque[Line] = deque()
        self.watches = False
        self.revision: int | None = None
        self.epoch = ""

    @property
    def seen(self) -> tuple[int | None, str]:
        """The last revision that it knows, and what list that is of."""
        return self.revision, self.epoch

    def ask(self, *requests: Line) -> None:
        """Send requests, all in one segment."""
        self.connection.sendall(b"".join(json.dumps(request).encode() + b"\n" for request in requests))

    def answer(self) -> Line:
        """The next answer; what comes before must be as foretold."""
        while self.heed(line := self._read()):
            pass
        return line

    def settle(self) -> None:
        """Read all that it is yet to be told."""
        while self.events or self.lost:
            line = self._read()
            assert self.heed(line), f"an answer to nothing: {line}"

    def event(self) -> Line:
        """The next event of the list, whatever it is."""
        line: Line = {"event": "health"}
        while line["event"] == "health":
            line = self._read()
        return line

    def end(self) -> list[Line]:
        """Read what comes until the gateway closes, or is gone, close too, and return the answers among it."""
        answers = []
        with contextlib.suppress(ConnectionError):
            while (line := self._lines.readline()).endswith(b"\n"):
                if not self.heed(found := json.loads(line)):
                    answers.append(found)
        self.close()
        return answers

    def close(self) -> None:
        """Go away."""
        self._lines.close()
        self.connection.close()

    def _read(self) -> Line:
        line: Line = json.loads(self._lines.readline())
        return line

    def heed(self, line: Line) -> bool:
        """Compare a line that nobody asked for with what was foretold; return whether it is one."""
        if "event" not in line:
            return False
        if line["event"] != "health":
            foretold = self.lost if line["event"] == "taken_over" else self.events
            assert foretold, f"unforetold: {line}"
            assert predicted(line) == foretold.popleft()
            self.revision = line.get("revision", self.revision)
        return True


class Site:
    """A broker, and gateways one after the other, each with what its predecessor has left until `clear`."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._numbers = count(1)
        self.clock = Clock(stack.directory / "clock")
        stack.start("broker")

    def clear(self) -> None:
        """Let the next gateway begin with nothing."""
        database = self._stack.directory / f"{next(self._numbers)}.sqlite"
        self._stack.configure(f'{SETTINGS}database = "{database}"\n{HOLDERS}')

    def start(self) -> Running:
        """Start a gateway that goes by the clock."""
        command = [sys.executable, "-m", "tests.services.gateway.clocked", str(self._stack.directory / "clock")]
        gateway = self._stack.spawn("gateway", command)
        gateway.wait_for('"ready"')
        return gateway


class Clients(RuleBasedStateMachine):
    """Actions of clients, and of the gateway meanwhile. One of them always watches, and reads at once."""

    site: ClassVar[Site]
    restarts: ClassVar[int]
    """The most starts of a gateway."""

    @initialize()
    def begin(self) -> None:
        """Start with an empty registry."""
        self.site.clear()
        self._numbers = count(1)
        self._restarts = 0
        self._seen: dict[int, tuple[int | None, str]] = {}
        self._there: dict[int, Conversation] = {}
        self._model = Model(self.site.clock.now, int(START * 1_000_000) - 1)
        self._start([self._model])

    @rule(place=places, request=registers)
    def register(self, place: int, request: Line) -> None:
        """Somebody signs up."""
        self._ask(place, [request])

    @rule(place=places, request=of_entries)
    def renew_or_leave(self, place: int, request: Line) -> None:
        """Somebody does something about an entry."""
        self._ask(place, [request])

    @rule(place=places, request=orders)
    def withhold_or_release(self, place: int, request: Line) -> None:
        """Somebody may decide whether a collector gets copies, or may not."""
        self._ask(place, [request])

    @rule(place=places, requests=bursts)
    def ask(self, place: int, requests: list[Line]) -> None:
        """Somebody makes several requests at once."""
        self._ask(place, requests)

    @rule(name=names)
    def sign_up(self, name: str) -> None:
        """Somebody says a name on the names protocol."""
        with socket.create_connection(("127.0.0.1", 5000), 20) as connection:
            caller = Caller(next(self._numbers), "127.0.0.1", connection.getsockname()[1])
            expected = self._model.sign_up(name, caller)
            self._foretell()
            connection.sendall(name.encode())
            line = predicted(json.loads(read_all(connection)))
            assert line == expected
            assert list(line) == list(expected)
        self._auditor.settle()

    @rule(place=places, resumes=st.booleans())
    def watch(self, place: int, resumes: bool) -> None:
        """Somebody watches, from where it has been before if it knows that."""
        client = self._client(place)
        self._watch(client, self._seen.get(place) if resumes else None)

    @rule(place=places)
    def read(self, place: int) -> None:
        """Somebody reads what it has been told; until then it does not."""
        if client := self._there.get(place):
            client.settle()

    @rule(place=places, abruptly=st.booleans())
    def go(self, place: int, abruptly: bool) -> None:
        """Somebody closes its connection, and with it what it holds by it."""
        if place in self._there:
            self._go(place, abruptly)

    @rule(seconds=st.sampled_from([1.0, 2.0, 5.0, 19.0, 20.0, 30.0, 61.0]))
    def pass_by(self, seconds: float) -> None:
        """Time passes."""
        self._model.pass_by(seconds)
        self._foretell()
        self.site.clock.pass_by(seconds)
        self._auditor.settle()

    @precondition(lambda self: self._restarts < self.restarts)
    @rule(place=places, requests=bursts, answers=st.integers(0, 4))
    def kill(self, place: int, requests: list[Line], answers: int) -> None:
        """The gateway is killed while it has requests: each is done or not, in order, and those answered are done."""
        client = self._client(place)
        completed = self._complete(requests)
        outcomes, expected = [copy.deepcopy(self._model)], []
        for request in completed:
            expected.append(self._model.answer(request, client.caller))
            outcomes.append(copy.deepcopy(self._model))
        self._foretell()
        client.ask(*completed)
        said = [client.answer() for _ in completed[:answers]]
        self._gateway.stop(signal.SIGKILL)
        said += client.end()
        assert list(map(predicted, said)) == expected[: len(said)]
        self._seen[place] = client.seen
        del self._there[place]
        self._part_all(whole=False)
        self._start(outcomes[len(said) :])

    @precondition(lambda self: self._restarts < self.restarts)
    @rule()
    def replace(self) -> None:
        """The gateway is told to end, says all that it has to say, and another one is started."""
        self._gateway.process.send_signal(signal.SIGTERM)
        self._part_all()
        assert self._gateway.process.wait(60) == 0
        self._start([self._model])

    def teardown(self) -> None:
        """In the end nobody has been told more or less than was foretold."""
        if not hasattr(self, "_auditor"):
            return
        try:
            for place in list(self._there):
                self._go(place)
            self._auditor.connection.shutdown(socket.SHUT_WR)
            self._part(AUDITOR, self._auditor)
            assert "Traceback" not in self._gateway.text
        finally:
            for client in [*self._there.values(), self._auditor]:
                client.close()
            self._gateway.stop(signal.SIGKILL)

    def _start(self, outcomes: list[Model]) -> None:
        """Start a gateway; what it has kept must be one of these outcomes."""
        self._restarts += 1
        self._gateway = self.site.start()
        self._auditor = self._connect("127.0.0.3")
        (request,) = self._complete([{"op": "list"}])
        self._auditor.ask(request)
        answer = self._auditor.answer()
        listed = predicted(answer)
        for outcome in outcomes:
            outcome.restart()
        self._model = next(each for each in outcomes if each.answer(request, self._auditor.caller) == listed)
        self._model.epoch = answer["epoch"]
        self._foretold = self._model.revision
        self._watch(self._auditor, self._seen.get(AUDITOR))

    def _connect(self, address: str, holder: str = "") -> Conversation:
        connection = socket.create_connection(("127.0.0.1", 5000), 20, (address, 0))
        client = Conversation(Caller(next(self._numbers), address, connection.getsockname()[1], holder), connection)
        if holder:
            client.ask({"op": "auth", "token": f"secret {holder}"})
            assert client.answer()["holder"] == holder
        return client

    def _client(self, place: int) -> Conversation:
        if place not in self._there:
            self._there[place] = self._connect(*PLACES[place])
        return self._there[place]

    def _go(self, place: int, abruptly: bool = False) -> None:
        client = self._there.pop(place)
        if abruptly:
            client.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            client.close()
        else:
            client.connection.shutdown(socket.SHUT_WR)
            self._part(place, client)
        held = self._model.held_by(client.caller.connection)
        left = [self._auditor.event() for _ in held]  # in any order, which is everybody's then
        assert sorted(line["name"] for line in left) == sorted(held)
        self._model.remove([line["name"] for line in left])
        self._foretell()
        assert all(map(self._auditor.heed, left))

    def _part(self, place: int, client: Conversation, whole: bool = True) -> None:
        """Read a connection to its end; unless all that was foretold is there it is not `whole`."""
        assert client.end() == []
        assert not (whole and (client.events or client.lost))
        self._seen[place] = client.seen

    def _part_all(self, whole: bool = True) -> None:
        for place, client in [*self._there.items(), (AUDITOR, self._auditor)]:
            self._part(place, client, whole)
        self._there = {}

    def _complete(self, requests: list[Line]) -> list[Line]:
        """The requests with an id, and the generation that their entry has now, or another one."""
        completed = []
        for request in requests:
            present = self._model.clients.get(request.get("name", ""))
            more = {"id": next(self._numbers)}
            if not request.get("port", 0) and ("streams" in request or "port" in request):
                more["port"] = 9600 + int(request["name"][1:])  # so that many can have copies sent to their address
            if "generation" in request:
                more["generation"] = request["generation"] + (present.client["generation"] if present else 1)
            completed.append(request | more)
        return completed

    def _ask(self, place: int, requests: list[Line]) -> None:
        client, completed = self._client(place), self._complete(requests)
        expected = [self._model.answer(request, client.caller) for request in completed]
        self._foretell()
        client.ask(*completed)
        for each in expected:
            line = predicted(client.answer())
            assert line == each
            assert list(line.get("clients", ())) == list(each.get("clients", ()))
        self._auditor.settle()

    def _watch(self, client: Conversation, seen: tuple[int | None, str] | None = None) -> None:
        (request,) = self._complete(
            [{"op": "watch"} | (dict(zip(("revision", "epoch"), seen, strict=True)) if seen else {})]
        )
        expected, missed = self._model.watch(request)
        client.ask(request)
        answer = client.answer()
        assert predicted(answer) == expected
        client.watches, client.revision, client.epoch = True, expected["revision"], answer["epoch"]
        client.events.extend(missed)

    def _foretell(self) -> None:
        """Add to what each client expects the lines about all that has happened since the last time."""
        begin = self._model.revision - len(self._model.events)
        fresh = self._model.events[self._foretold - begin :]
        self._foretold = self._model.revision
        for client in [*self._there.values(), self._auditor]:
            client.events.extend(fresh if client.watches else ())
            client.lost.extend(line for number, line in self._model.told if number == client.caller.connection)
        self._model.told = []


@pytest.mark.timeout(3600)  # what fails is made small before it is shown, which takes minutes
@pytest.mark.parametrize(
    ("examples", "steps", "restarts"), [(6, 50, 2), pytest.param(60, 100, 5, marks=pytest.mark.soak)]
)
def test_every_line_is_foretold(stack: Stack, examples: int, steps: int, restarts: int) -> None:
    """Answers and events are those of the model, whatever clients and time do, through any number of kills."""

    class There(Clients):
        site = Site(stack)

    There.restarts = 1 + restarts
    with contextlib.closing(There.site.clock):
        run_state_machine_as_test(There, settings=settings(max_examples=examples, stateful_step_count=steps))
