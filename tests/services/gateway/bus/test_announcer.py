import itertools
import json
import socket
import time
from collections.abc import Iterator
from typing import Any, get_args

import pytest
import zmq

from shared.bus.bodies.health_message import Health
from shared.bus.messages import (
    REGISTRY_TOPIC,
    Message,
    RegistryChange,
    RegistrySnapshot,
    ServeReply,
    ServeRequest,
    health_topic,
    serve_topic,
)
from shared.bus.zmq_sockets import Publisher, Subscriber, new_context
from shared.client import Client, Source
from tests.stack import Running, Stack, ask, ask_json, wait_until

RELAY, ORIGINAL = serve_topic("relay"), serve_topic("original")
COLLECTOR = {"op": "register", "name": "siem", "streams": ["messages"], "port": 9514}
PRESERVING = COLLECTOR | {"name": "preserving", "source": "original"}


class Follower:
    """A subscriber that keeps the registry as it is announced, and answers serve requests if told to.

    While it follows, it says each half second that it is there, as a service that sends copies does.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], stack: Stack, sender: str = "test.1") -> None:
        self.clients: dict[str, Client] = {}
        self.revision = -1
        self.pieces = 0
        self.requests: list[ServeRequest] = []
        self.replies = False
        self._sources: list[Source] = []
        self._says_at = 0.0
        self._reports = itertools.count(1)
        self._subscriber = Subscriber(context, stack.bus, 10_000)
        self._publisher = Publisher(context, stack.bus, sender, 100)

    def subscribe(self, prefix: str) -> None:
        self._subscriber.subscribe(prefix)
        self._sources += [source for source in get_args(Source) if prefix == serve_topic(source)]

    def unsubscribe(self, prefix: str) -> None:
        self._subscriber.unsubscribe(prefix)

    def follow(self) -> None:
        self._publisher.new_subscriptions()
        if time.monotonic() >= self._says_at:
            self._says_at = time.monotonic() + 0.5
            for source in self._sources:
                self._publisher.publish(health_topic(source), Health(source, next(self._reports), 0, 1, []))
        while (message := self._subscriber.receive()) is not None:
            self._take(message)

    def _take(self, message: Message) -> None:
        match message.body:
            case RegistrySnapshot(revision, piece, _, clients):
                if piece == 0:
                    self.clients, self.pieces, self.revision = {}, 0, revision
                assert (revision, piece) == (self.revision, self.pieces)
                self.pieces += 1
                self.clients |= {client.name: client for client in clients}
            case RegistryChange(after, revision, joined, left) if self.revision >= 0:
                assert after == self.revision
                self.revision = revision
                for name in left:
                    del self.clients[name]
                self.clients |= {client.name: client for client in joined}
            case ServeRequest(id, reply, revision):
                self.requests.append(message.body)
                if self.replies:
                    assert revision <= self.revision
                    self._publisher.publish(reply, ServeReply(id, revision))
            case _:
                pass

    def ready(self) -> bool:
        """Return whether a reply of ours would reach the gateway."""
        self.follow()
        return any(self._publisher.wanted(request.reply) for request in self.requests)

    def asked(self) -> bool:
        """Return whether a question has come."""
        self.follow()
        return bool(self.requests)

    def close(self) -> None:
        self._subscriber.close()
        self._publisher.close()


@pytest.fixture
def follower(stack: Stack) -> Iterator[Follower]:
    """A broker, a gateway, and a subscriber that has asked for nothing yet."""
    stack.configure("[gateway]\nmax_clients = 30000\nserve_seconds = 2\n")
    stack.start("broker")
    stack.start("gateway")
    context = new_context()
    follower = Follower(context, stack)
    yield follower
    follower.close()
    context.term()


def wait_for(follower: Follower, count: int) -> None:
    """Wait until the follower knows so many clients."""

    def followed() -> bool:
        follower.follow()
        return follower.revision >= 0 and len(follower.clients) == count

    wait_until(followed, f"{count} clients on the bus")


def test_empty_registry_is_announced(follower: Follower) -> None:
    """A subscriber hears that there is nobody."""
    follower.subscribe(REGISTRY_TOPIC)
    wait_for(follower, 0)
    assert follower.pieces == 1


def test_late_subscriber_gets_everything(follower: Follower) -> None:
    """A late subscriber gets the whole registry in pieces of one revision, and numbered changes after that."""
    ask(b"".join(b'{"op":"register","name":"%d%s"}\n' % (number, b"x" * 240) for number in range(4_000)), seconds=60)
    follower.subscribe(REGISTRY_TOPIC)
    wait_for(follower, 4_000)
    assert follower.pieces > 1
    follower.pieces = 0
    leaver = ask_json({"op": "register", "name": "leaver"})["client"]
    ask(b"".join(b'{"op":"register","name":"more%d"}\n' % number for number in range(500)))
    wait_for(follower, 4_501)
    ask_json({"op": "leave", "name": "leaver", "generation": leaver["generation"]})
    wait_for(follower, 4_500)
    assert follower.pieces == 0
    assert follower.revision == ask_json({"op": "list"})["revision"]
    ask(b'{"op":"register","name":"other","streams":["*"],"port":9,"from":["10.0.0.0/8"],"sample":2,"group":"g"}\n')
    wait_for(follower, 4_501)
    other = follower.clients["other"]
    assert (other.streams, other.prefixes, other.sample) == (("*",), ("10.0.0.0/8",), 2)
    assert len(other.group) == 32  # an identifier that nobody can make, in the place of the holder's word for it


def test_two_subscribers_one_after_the_other(stack: Stack, follower: Follower) -> None:
    """A second subscriber to the same topic gets the whole registry too."""
    ask(b"name")
    follower.subscribe(REGISTRY_TOPIC)
    wait_for(follower, 1)
    context = new_context()
    second = Follower(context, stack)
    second.subscribe(REGISTRY_TOPIC)
    wait_for(second, 1)
    second.close()
    context.term()


def answer_to(connection: socket.socket, *followers: Follower) -> bytes:
    """The answer on a connection, with the followers at work meanwhile."""
    connection.settimeout(0.01)
    for _ in itertools.count():
        for follower in followers:
            follower.follow()
        try:
            return connection.recv(65536)
        except TimeoutError:
            pass
    raise AssertionError


def wait_for_health(name: str, expected: str, *followers: Follower) -> None:
    """Wait until an entry's copies do as expected, with the followers at work meanwhile."""

    def reached() -> bool:
        for follower in followers:
            follower.follow()
        return str(ask_json({"op": "list"})["clients"][name]["health"]) == expected

    wait_until(reached, f"health of {name} becomes {expected}")


def test_answer_waits_for_the_forwarder(follower: Follower) -> None:
    """A collector's answer comes once the forwarder says that it serves it, later lines behind it, and health is ok."""
    follower.subscribe(REGISTRY_TOPIC)
    follower.subscribe(RELAY)
    ask_json(COLLECTOR | {"name": "first", "port": 9515})
    wait_until(follower.ready, "a serve request, and our reply topic known")
    follower.replies = True
    with socket.create_connection(("127.0.0.1", 5000)) as connection:
        connection.sendall(b'{"op":"register","name":"c","streams":["messages"],"port":9514}\n{"op":"streams"}\n')
        answers = b""
        while answers.count(b"\n") < 2:
            answers += answer_to(connection, follower)
    first, second = answers.splitlines()
    assert b'"health":"ok"' in first
    assert b'"streams":{' in second


def test_forwarder_that_does_not_answer(follower: Follower) -> None:
    """The collector is told when no service answers in time; once one serves it, its health becomes ok."""
    follower.subscribe(REGISTRY_TOPIC)
    follower.subscribe(RELAY)
    wait_for(follower, 0)
    assert ask_json(COLLECTOR)["client"]["health"] == "waiting"
    follower.replies = True
    wait_for_health("siem", "ok", follower)
    follower.unsubscribe(RELAY)
    wait_for_health("siem", "waiting")


def test_without_a_forwarder_nobody_waits(follower: Follower) -> None:
    """With nobody to ask the answer comes at once and says that copies are waited for."""
    assert ask_json(COLLECTOR)["client"]["health"] == "waiting"


def register(followers: list[Follower], request: dict[str, object]) -> dict[str, Any]:
    """The answer to a `register`, with the followers at work meanwhile."""
    with socket.create_connection(("127.0.0.1", 5000)) as connection:
        connection.sendall(json.dumps(request).encode() + b"\n")
        answer: dict[str, Any] = json.loads(answer_to(connection, *followers))
        return answer


def test_transmitter_that_comes_and_goes(follower: Follower) -> None:
    """Copies with the exporter's address are refused while nobody sends them; who does is asked, again if it returns.

    Its going shows at once, and nothing is restarted for it.
    """
    refusal = ask_json(PRESERVING)
    assert (refusal["error"], "`fanwire doctor`" in refusal["message"]) == ("no_transmitter", True)
    follower.replies = True
    follower.subscribe(REGISTRY_TOPIC)
    follower.subscribe(ORIGINAL)
    wait_until(lambda: register([follower], PRESERVING)["ok"], "a transmitter is noticed")
    wait_for_health("preserving", "ok", follower)
    follower.unsubscribe(ORIGINAL)
    wait_for_health("preserving", "waiting")
    assert ask_json(PRESERVING | {"name": "late"})["error"] == "no_transmitter"
    follower.subscribe(ORIGINAL)
    wait_for_health("preserving", "ok", follower)


def test_each_source_is_asked_on_its_own(stack: Stack, follower: Follower) -> None:
    """The question about one kind of copies waits for who sends those, and the other's silence shows on its own."""
    context = new_context()
    transmitter = Follower(context, stack, "test.2")
    for each, topic in ((follower, RELAY), (transmitter, ORIGINAL)):
        each.subscribe(REGISTRY_TOPIC)
        each.subscribe(topic)
        wait_for(each, 0)
    first = PRESERVING | {"name": "first", "port": 9515}
    wait_until(lambda: register([transmitter], first)["ok"], "a transmitter is noticed")
    wait_until(transmitter.ready, "our reply topic known")
    transmitter.replies = True
    assert register([transmitter], PRESERVING)["client"]["health"] == "ok"
    assert register([follower, transmitter], COLLECTOR)["client"]["health"] == "waiting"
    wait_for_health("first", "ok", transmitter)
    wait_for_health("preserving", "ok", transmitter)
    (asked,) = {request.revision for request in follower.requests}
    assert asked >= max(request.revision for request in transmitter.requests)
    transmitter.close()
    context.term()


def test_whoever_begins_to_send_copies_is_asked(stack: Stack, follower: Follower) -> None:
    """A second process that sends the same copies is asked too, though all is served as far as the first one said."""
    follower.replies = True
    follower.subscribe(REGISTRY_TOPIC)
    follower.subscribe(RELAY)
    wait_for(follower, 0)
    register([follower], COLLECTOR)
    wait_for_health("siem", "ok", follower)
    context = new_context()
    second = Follower(context, stack, "test.2")
    second.subscribe(RELAY)
    wait_until(second.asked, "the second one is asked")
    second.close()
    context.term()


def test_configured_collector_waits_for_a_transmitter(stack: Stack) -> None:
    """A collector of the settings is entered whoever is there, waits until somebody serves it, and then is well."""
    collector = 'name = "c"\nstreams = ["*"]\naddress = "10.0.0.1"\nport = 9\nsource = "original"\nhop_limit = 3\n'
    stack.configure(f"[[collector]]\n{collector}")
    stack.start("broker")
    stack.start("gateway")
    wait_for_health("c", "waiting")
    context = new_context()
    transmitter = Follower(context, stack)
    transmitter.replies = True
    transmitter.subscribe(REGISTRY_TOPIC)
    transmitter.subscribe(ORIGINAL)
    wait_for_health("c", "ok", transmitter)
    assert transmitter.clients["c"].hop_limit == 3
    transmitter.close()
    context.term()


def test_broker_restarted(stack: Stack, follower: Follower) -> None:
    """After the broker was killed and started again the subscriber gets the whole registry anew."""
    follower.subscribe(REGISTRY_TOPIC)
    wait_for(follower, 0)
    stack["broker"].process.kill()
    stack["broker"].process.wait()
    ask(b"meanwhile")
    stack.start("broker")
    wait_for(follower, 1)


def test_gateway_restarted(stack: Stack, follower: Follower) -> None:
    """After the gateway was restarted the subscriber gets its registry, without being asked to do anything."""
    follower.subscribe(REGISTRY_TOPIC)
    ask(b"before")
    wait_for(follower, 1)
    gateway: Running = stack["gateway"]
    gateway.stop()
    follower.clients = {}
    stack.start("gateway")
    wait_for(follower, 1)
    ask(b"after")
    wait_for(follower, 2)
