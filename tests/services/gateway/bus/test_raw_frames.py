import json
import socket
import time
from collections.abc import Iterator
from select import select
from typing import Any

import pytest

from services.gateway.bus.raw_frames import MAX_OPEN, MAX_OPEN_OF_HOLDER, Transmissions
from services.gateway.protocol.requests import Octets, Transmit
from shared.bus.messages import TRANSMIT_TOPIC, Body, TransmitReply, TransmitRequest
from shared.bus.zmq_sockets import Requests
from tests.builders import BusEnds
from tests.services.operator.played import PlayedTransmitter
from tests.stack import Stack, ask_json, wait_until

FRAME = bytes.fromhex("010203040506 010203040506 0801") + b"payload" + bytes.fromhex("1a2b3c4d")
REQUEST = {"op": "transmit", "interface": "eth1", "frame": FRAME.hex()}


@pytest.fixture
def transmitter(stack: Stack) -> Iterator[PlayedTransmitter]:
    """A gateway that lets clients send frames, and a transmitter that it has seen."""
    stack.configure("[gateway]\nallow_transmit = true\n")
    stack.start("broker")
    stack.start("gateway")
    assert ask_json(REQUEST)["error"] == "no_transmitter"
    with BusEnds(stack.bus) as bus:
        played = PlayedTransmitter(bus)
        wait_until(lambda: seen(played), "the gateway sees the transmitter")
        yield played


def seen(transmitter: PlayedTransmitter) -> bool:
    """Return whether the gateway passes a request on; it is answered."""
    with send(REQUEST) as connection:
        while not (message := transmitter.subscriber.receive()):
            if select([connection], [], [], 0.01)[0]:
                assert answer(connection)["error"] == "no_transmitter"
                return False
        assert isinstance(message.body, TransmitRequest)
        transmitter.answer(message.body, 1)
        return bool(answer(connection)["ok"])  # from here on nothing is open


def send(request: dict[str, Any]) -> socket.socket:
    """A connection on which a request was sent."""
    connection = socket.create_connection(("127.0.0.1", 5000), timeout=60)
    connection.sendall(json.dumps(request).encode() + b"\n")
    return connection


def answer(connection: socket.socket) -> dict[str, Any]:
    """The answer that comes on a connection."""
    line = b""
    while not line.endswith(b"\n"):  # the next answer may be there already
        line += connection.recv(1)
    answered: dict[str, Any] = json.loads(line)
    return answered


def test_the_transmitter_is_asked_and_its_answer_comes_back(transmitter: PlayedTransmitter) -> None:
    """Everything that was asked for reaches the transmitter; other connections are answered meanwhile."""
    parts = {"destination": FRAME[:6].hex(":"), "source": FRAME[6:12].hex("-"), "ethertype": "0x0801"}
    parts |= {"payload": FRAME[14:-4].hex(), "checksum": FRAME[-4:].hex()}
    wishes = {"count": 3, "per_second": 1000, "own_fcs": True, "id": "t"}
    with send({"op": "transmit", "interface": "eth1", **parts, **wishes}) as connection:
        request = transmitter.take()
        expected = TransmitRequest(request.id, request.reply, "eth1", FRAME, 3, 1000.0, True)
        assert request == expected
        connection.sendall(b'{"op":"list","id":"l"}\n')
        assert ask_json({"op": "list"})["ok"]
        transmitter.answer(request, 3)
        assert answer(connection) == {"ok": True, "id": "t", "sent": 3}
        assert answer(connection)["id"] == "l"


@pytest.mark.parametrize(
    ("word", "answered"),
    [("not_permitted", "not_permitted"), ("bad_request", "bad_request"), ("newer_word", "unavailable")],
)
def test_the_transmitters_refusal_is_passed_on(transmitter: PlayedTransmitter, word: str, answered: str) -> None:
    """Its word and its message are the client's; a word that clients do not know becomes one that they do."""
    with send(REQUEST | {"id": 5, "count": 3}) as connection:
        transmitter.answer(transmitter.take(), 2, word, "eth1 is down")
        assert answer(connection) == {
            "ok": False,
            "id": 5,
            "error": answered,
            "message": "eth1 is down; 2 of 3 frames have left",
        }


def test_no_answer_by_the_deadline(stack: Stack, transmitter: PlayedTransmitter) -> None:
    """After the time that the frames take and two seconds the client is told who did not answer; its end is no harm."""
    began = time.monotonic()
    with send(REQUEST | {"count": 3, "per_second": 2}) as connection:
        late = transmitter.take()
        refused = answer(connection)
        assert time.monotonic() - began >= 3.0
        assert refused["error"] == "unavailable"
        assert "transmitter did not answer" in refused["message"]
        transmitter.answer(late, 3)
        connection.sendall(json.dumps(REQUEST).encode() + b"\n")
        transmitter.answer(transmitter.take(), 1)
        assert answer(connection) == {"ok": True, "sent": 1}
        connection.sendall(json.dumps(REQUEST).encode() + b"\n")
        transmitter.take()
        assert stack["gateway"].stop() == 0


def test_a_transmitter_that_has_gone(transmitter: PlayedTransmitter) -> None:
    """Requests are refused at once when the last transmitter has gone."""
    transmitter.subscriber.unsubscribe(TRANSMIT_TOPIC)
    wait_until(lambda: ask_json(REQUEST)["error"] == "no_transmitter", "the gateway sees it go")


def test_one_request_too_many(transmitter: PlayedTransmitter) -> None:
    """A limited number may wait for the transmitter, also for clients that have left; one more is refused."""
    connections = [send(REQUEST) for _ in range(MAX_OPEN)]
    requests = [transmitter.take() for _ in connections]
    refused = ask_json(REQUEST)
    assert (refused["error"], "try again" in refused["message"]) == ("unavailable", True)
    for connection in connections[::2]:
        connection.close()
    for request in requests:
        transmitter.answer(request, 1)
    assert [answer(connection)["sent"] for connection in connections[1::2]] == [1] * (MAX_OPEN // 2)
    for connection in connections[1::2]:
        connection.close()
    with send(REQUEST) as connection:
        transmitter.answer(transmitter.take(), 1)
        assert answer(connection)["ok"]


def test_a_request_that_the_bus_refuses_is_answered_at_once() -> None:
    """The client hears at once that the bus is full, and nothing of its request is left behind."""

    class FullBus:
        def wanted(self, _topic: str) -> bool:
            return True

        def publish(self, _topic: str, _body: Body) -> bool:
            return False

    outcomes: list[TransmitReply | None] = []
    clock = 0.0
    requests = Requests("gateway", 1, lambda: clock)
    transmissions = Transmissions(FullBus(), requests)  # type: ignore[arg-type]
    for _ in range(2 * MAX_OPEN):
        with pytest.raises(OSError, match="the bus"):
            transmissions.send_frames(Transmit(interface="eth1", frame=Octets(FRAME)), "", outcomes.append)
    clock = 1e6
    requests.expire()
    assert outcomes == []


def test_a_holder_leaves_room_for_others() -> None:
    """A holder that asks for much, for long, leaves room for frames of others and of this host."""

    class Bus:
        def publish(self, _topic: str, _body: Body) -> bool:
            return True

    clock, request = 0.0, Transmit(interface="eth1", frame=Octets(FRAME))
    requests = Requests("gateway", 1, lambda: clock)
    transmissions = Transmissions(Bus(), requests)  # type: ignore[arg-type]
    outcomes: list[TransmitReply | None] = []

    def taken(holder: str) -> int:
        for count in range(2 * MAX_OPEN):
            try:
                transmissions.send_frames(request, holder, outcomes.append)
            except OSError:
                return count
        raise AssertionError("without end")

    assert [taken("red"), taken("blue"), taken("red")] == [MAX_OPEN_OF_HOLDER, MAX_OPEN_OF_HOLDER, 0]
    assert taken("") == MAX_OPEN - 2 * MAX_OPEN_OF_HOLDER
    clock = 1e6
    requests.expire()
    assert outcomes == [None] * MAX_OPEN
    assert taken("red") == MAX_OPEN_OF_HOLDER


def test_frames_are_not_for_clients_by_default(stack: Stack) -> None:
    """Unless the settings let them, clients are refused, and told which setting it is."""
    stack.start("broker")
    stack.start("gateway")
    refused = ask_json(REQUEST)
    assert (refused["error"], "[gateway] allow_transmit" in refused["message"]) == ("not_permitted", True)
