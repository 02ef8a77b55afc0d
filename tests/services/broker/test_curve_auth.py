import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import zmq

from services.broker.filtering_proxy import KEPT_BACK
from shared.bus.curve_keys import ROLES, write_keys
from shared.bus.endpoint import ipc_endpoint, open_link
from shared.bus.messages import (
    REGISTRY_TOPIC,
    TRANSMIT_TOPIC,
    Body,
    Datagrams,
    RegistrySnapshot,
    ServeReply,
    Status,
    TransmitRequest,
    datagrams_topic,
    encode,
    status_topic,
)
from shared.client import Client
from shared.ledger.accounts import Accounts
from shared.ledger.counters import BUS_REFUSED, REFUSED_MALFORMED, REFUSED_SENDER, REFUSED_TOPIC
from shared.settings.tables import Bus
from tests.builders import BusEnds, accounts_when, kill_all, make_batch, make_client, take, wait_wanted
from tests.stack import Stack, wait_until

TOPIC = datagrams_topic("messages")
EVIL = RegistrySnapshot(9, 0, 1, [make_client("evil")])


@pytest.fixture
def keys(stack: Stack) -> Iterator[Path]:
    """A broker that has keys, and the directory with the keys of all."""
    directory = stack.directory / "keys"
    directory.mkdir()
    list(write_keys(directory, ROLES))
    stack.configure(f'keys = "{directory}"\n')
    stack.start("broker")
    yield directory
    kill_all(stack)


@contextmanager
def acting_as(role: str, stack: Stack, keys: Path) -> Iterator[BusEnds]:
    """The test's ends of the bus, with a role's key."""
    with BusEnds(stack.bus, open_link(Bus(keys=str(keys)), role)) as bus:
        yield bus


def refused(stack: Stack, keys: Path, **expected: int) -> None:
    """Wait until the broker has counted so many refusals, and no others."""
    with acting_as("operator", stack, keys) as bus:
        found = accounts_when(bus, "broker.1", lambda accounts: expected.items() <= accounts["broker"].items())
    causes = {name: count for name, count in found["broker"].items() if "refused" in name}
    assert {name: causes[name] for name in causes.keys() - set(KEPT_BACK)} == expected


def test_key_of_ingest_publishes_no_registry_and_no_frames(stack: Stack, keys: Path) -> None:
    """A message that ingest's key may not publish is dropped, counted and logged, whatever its kind; datagrams pass."""
    frame = TransmitRequest(1, "reply/ingest.1/", "eth0", bytes(60))
    with acting_as("ingest", stack, keys) as ours, acting_as("forwarder", stack, keys) as theirs:
        subscriber = theirs.subscriber("")
        publisher, forged = ours.publisher("ingest.1"), ours.publisher("gateway.1")
        for each in (publisher, forged):
            wait_wanted(each, REGISTRY_TOPIC)
        for each in (publisher, forged):
            each.publish(REGISTRY_TOPIC, EVIL)
            each.publish(TRANSMIT_TOPIC, frame)
        publisher.publish(status_topic("ingest.1"), EVIL)
        publisher.publish(status_topic("ingest.2"), Status("ingest.2", 1, 0, 1, 0, 1, {}))
        for parts in ([b"datagrams/messages/", b"", b""], [b"\xff/", b"\x90", b""], [b"registry/"], [b""]):
            publisher.socket.send_multipart(parts)
        publisher.publish(TOPIC, Datagrams("messages", 0), make_batch([b"passes"]))
        while (message := take(subscriber)).topic != TOPIC:
            assert message.topic == status_topic("broker.1")
        assert message.batch is not None
        assert [payload for *_, payload in message.batch.datagrams()] == [b"passes"]
        assert not subscriber.rejected
    refused(stack, keys, **{REFUSED_TOPIC: 4, REFUSED_SENDER: 2, REFUSED_MALFORMED: 4})
    said = [line for line in stack["broker"].log if "refused" in line["event"]]
    assert said[0]["event"] == "message refused: the role of its key may not publish it"
    assert (said[0]["role"], said[0]["topic"]) == ("ingest", REGISTRY_TOPIC)
    assert len(said) <= 3, "more than a line a second"


@pytest.mark.parametrize(
    ("role", "topic", "body"),
    [
        ("gateway", REGISTRY_TOPIC, EVIL),
        ("gateway", TRANSMIT_TOPIC, TransmitRequest(1, "reply/gateway.1/", "eth0", bytes(60))),
        ("operator", TRANSMIT_TOPIC, TransmitRequest(1, "reply/operator.1/", "eth0", bytes(60))),
        ("forwarder", "reply/gateway.1.5/", ServeReply(1, 1)),
        ("transmitter", "reply/gateway.1.5/", ServeReply(1, 1)),
        ("ingest", status_topic("ingest.1"), Status("ingest.1", 1, 0, 1, 0, 1, {})),
    ],
)
def test_what_is_ones_own_passes(stack: Stack, keys: Path, role: str, topic: str, body: Body) -> None:
    """Each role's own messages pass, as they were sent."""
    with acting_as(role, stack, keys) as ours, acting_as("transmitter", stack, keys) as theirs:
        subscriber, publisher = theirs.subscriber(topic), ours.publisher(f"{role}.1")
        wait_wanted(publisher, topic)
        assert publisher.publish(topic, body)
        message = take(subscriber)
    assert (message.topic, message.body, message.envelope.sender) == (topic, body, f"{role}.1")
    refused(stack, keys)


def test_large_messages_of_several_parts_keep_their_order(stack: Stack, keys: Path) -> None:
    """Batches of half a megabyte arrive byte for byte and in order."""
    batch = make_batch([bytes([number]) * 60_000 for number in range(8)])
    with acting_as("ingest", stack, keys) as ours, acting_as("forwarder", stack, keys) as theirs:
        subscriber, publisher = theirs.subscriber(TOPIC), ours.publisher()
        wait_wanted(publisher, TOPIC)
        for number in range(50):
            wait_until(lambda: publisher.publish(TOPIC, Datagrams("messages", 0), batch), "the bus takes it")
            message = take(subscriber)
            assert message.envelope.sequence == number
            assert message.batch is not None
            assert bytes(message.batch.payload) == batch.payload


@pytest.mark.parametrize(("stranger", "said"), [("plain", "it has no key"), ("unknown", "unknown key")])
def test_strangers_neither_hear_nor_speak(stack: Stack, keys: Path, stranger: str, said: str) -> None:
    """A connection without a key, or with one that is not on the list, gets no message and has none passed on."""
    public, secret = zmq.curve_keypair()

    def connected(context: zmq.Context[zmq.Socket[bytes]], kind: int, endpoint: str) -> zmq.Socket[bytes]:
        sock = context.socket(kind)
        sock.set(zmq.LINGER, 0)
        if stranger == "unknown":
            sock.set(zmq.CURVE_PUBLICKEY, public)
            sock.set(zmq.CURVE_SECRETKEY, secret)
            sock.set(zmq.CURVE_SERVERKEY, (keys / "broker.public").read_bytes().strip())
        if kind == zmq.SUB:
            sock.subscribe("")
        sock.connect(endpoint)
        return sock

    began = time.monotonic()
    with (
        acting_as("gateway", stack, keys) as bus,
        acting_as("operator", stack, keys) as reader,
        zmq.Context() as context,
    ):
        subscriber, publisher = bus.subscriber("registry/"), bus.publisher("gateway.1")
        wait_wanted(publisher, REGISTRY_TOPIC)
        parts = encode(REGISTRY_TOPIC, EVIL, sender="gateway.1", boot=1, sequence=0, total=0)

        def refused_twice(accounts: Accounts) -> bool:
            # a stranger that is the first to close is not counted, and it does not try again
            with (
                connected(context, zmq.SUB, ipc_endpoint(stack.bus, "subscribe")) as ears,
                connected(context, zmq.PUB, ipc_endpoint(stack.bus, "publish")) as mouth,
            ):
                deadline = time.monotonic() + 0.2
                while time.monotonic() < deadline:
                    mouth.send_multipart(parts)
                    publisher.publish(REGISTRY_TOPIC, RegistrySnapshot(1, 0, 1, list[Client]()))
                    body = take(subscriber).body
                    assert isinstance(body, RegistrySnapshot)
                    assert body.revision == 1
                assert not ears.poll(0)
            return accounts["broker"].get(BUS_REFUSED, 0) >= 2

        accounts_when(reader, "broker.1", refused_twice)
    assert f"connection refused: {said}" in stack["broker"].text
    event, *more = (line for line in stack["broker"].log if "connection refused" in line["event"])
    assert len(more) <= time.monotonic() - began, "more than a line a second"
    if stranger == "unknown":
        assert (event["file"], len(event["key"])) == (f"{keys}/ROLE.NAME.public", 40)


def test_a_key_that_is_added_gets_in(stack: Stack, keys: Path) -> None:
    """A public key made elsewhere and put on the broker's list stands for its role once the broker has read it."""
    elsewhere = stack.directory / "elsewhere"
    elsewhere.mkdir()
    list(write_keys(elsewhere, ["ingest"]))
    (elsewhere / "broker.public").write_bytes((keys / "broker.public").read_bytes())
    (keys / "ingest.branch.public").write_bytes((elsewhere / "ingest.public").read_bytes())
    kill_all(stack)
    stack.start("broker")
    with acting_as("ingest", stack, elsewhere) as ours, acting_as("forwarder", stack, keys) as theirs:
        subscriber, publisher = theirs.subscriber(TOPIC), ours.publisher("ingest.7")
        wait_wanted(publisher, TOPIC)
        publisher.publish(TOPIC, Datagrams("messages", 0), make_batch([b"x"]))
        assert take(subscriber).envelope.sender == "ingest.7"


@pytest.mark.parametrize("name", ["broker", "gateway", "ingest", "forwarder", "transmitter", "operator"])
def test_missing_key_is_one_line_everywhere(stack: Stack, name: str) -> None:
    """A program whose key is not there ends with 78 and one line that names the file and what makes keys."""
    stack.configure(f'keys = "{stack.directory}/keys"\n')
    running = stack.start(name, *(("watch",) if name == "operator" else ()), ready=False)
    assert running.process.wait(60) == 78
    directory = stack.directory / "keys"
    cure = f"{directory}/{name}.secret: there is no such key; make keys with `fanwire keys {directory}`"
    assert running.text.splitlines()[-1] == cure
    assert "Traceback" not in running.text


def test_broker_with_another_pair_is_told_so(stack: Stack, keys: Path) -> None:
    """A broker whose public key is not that of its secret one is refused: nobody could connect to it."""
    kill_all(stack)
    (keys / "broker.public").write_bytes((keys / "ingest.public").read_bytes())
    (keys / "ingest.public").unlink()
    broker = stack.start("broker", ready=False)
    assert broker.process.wait(60) == 78
    assert broker.text == f"{keys}/broker.public: not the public key of broker.secret; use the pair made together\n"


def test_broker_with_keys_ends_and_starts_like_any(stack: Stack, keys: Path) -> None:
    """SIGTERM ends it with 0, nothing left behind, and the next one is found by who was connected."""
    with acting_as("ingest", stack, keys) as ours, acting_as("forwarder", stack, keys) as theirs:
        subscriber, publisher = theirs.subscriber(TOPIC), ours.publisher()
        wait_wanted(publisher, TOPIC)
        assert stack["broker"].stop() == 0
        assert [path.name for path in stack.bus.iterdir()] == ["lock"]
        stack.start("broker")

        def passes() -> bool:
            publisher.publish(TOPIC, Datagrams("messages", 0), make_batch([b"x"]))
            return subscriber.receive() is not None

        wait_until(passes, "both are connected again")
