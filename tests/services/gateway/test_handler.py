"""The handler between a decision and its answer; what it decides by, and what it changes, is tested with them."""

import errno
import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, get_args

import pytest

from services.gateway.admission.address_proof import AddressProofs
from services.gateway.admission.decision import Admission
from services.gateway.admission.destinations import Destinations
from services.gateway.admission.peer import Peer
from services.gateway.admission.rights import HERE as EVERYTHING
from services.gateway.admission.rights import NOBODY, SCOPES_NEEDED
from services.gateway.admission.tokens import Tokens
from services.gateway.event_feed import EventFeed
from services.gateway.handler import Answer, Handler
from services.gateway.protocol.requests import (
    Auth,
    Confirm,
    Leave,
    ListClients,
    ListStreams,
    Octets,
    Operation,
    Register,
    Renew,
    Request,
    RequestError,
    SignUp,
    Transmit,
    WatchClients,
)
from services.gateway.registry.entry import Event
from services.gateway.render import event_line, health_line
from shared.bus.messages import TransmitReply
from shared.client import Source
from shared.settings.model import Settings
from shared.settings.tables import Gateway
from tests.services.gateway.table import HERE, Table

REQUESTS: list[Request] = [
    SignUp("c"),
    Auth(token="x"),
    Register("c"),
    Renew(name="c", generation=1),
    Leave(name="c", generation=1),
    ListClients(),
    WatchClients(),
    Confirm(name="c", nonce="n"),
    ListStreams(),
    Transmit(interface="eth0", frame=Octets(bytes(14))),
]


class Bus:
    """The services beyond the bus, as the handler knows them."""

    def __init__(self) -> None:
        self.full = False
        self.announced = 0
        self.waiting: list[Callable[[TransmitReply | None], None]] = []

    def announce_soon(self) -> None:
        self.announced += 1

    def ask_served(self, _source: Source, finished: Callable[[], None]) -> None:
        finished()

    def send_frames(self, _request: Transmit, _holder: str, finished: Callable[[TransmitReply | None], None]) -> None:
        if self.full:
            raise OSError(errno.ENOBUFS, "the bus is full")
        self.waiting.append(finished)


class Handling:
    """A handler, and the answers that it has given."""

    def __init__(self) -> None:
        self.disk_full = False
        self.bus = Bus()
        self.table = Table(keep=lambda events, generation: self._keep(events, generation))
        destinations = Destinations(["messages"], [], lambda _: False, lambda _: False)
        settings = Settings(gateway=Gateway(allow_transmit=True))
        proofs = AddressProofs(lambda *_: None, lambda: 0.0)
        admission = Admission(settings.gateway, self.table, destinations, proofs, lambda _: True, lambda: True)
        feed = EventFeed(self.table, partial(event_line, self.table), partial(health_line, self.table))
        clock, tokens = lambda: self.table.now, Tokens(())
        self.handler = Handler(
            settings, self.table, admission, self.bus, feed, self.bus.send_frames, clock, tokens, "e"
        )
        self.answers: list[bytes] = []
        self.handler.add_connection(HERE, lambda _: None)

    def _keep(self, _events: Sequence[Event], _generation: int) -> None:
        if self.disk_full:
            raise OSError(errno.EIO, "the registry can't be written to disk just now")

    def _reply(self, answer: Answer) -> None:
        self.answers.append(b"".join(answer))

    def handle(self, request: Request, peer: Peer = HERE) -> None:
        """Handle a request."""
        self.handler.handle(request, peer, self._reply)

    def last(self) -> dict[str, Any]:
        """The last answer."""
        answer: dict[str, Any] = json.loads(self.answers[-1])
        return answer


@pytest.fixture
def handling() -> Handling:
    """A handler with an empty registry."""
    return Handling()


def test_every_request_is_asked_for_its_rights(handling: Handling) -> None:
    """A peer without rights gets no answer and no effect of any request but `auth`."""
    assert {type(request) for request in REQUESTS} == {SignUp, *get_args(Operation)} == SCOPES_NEEDED.keys()
    stranger = Peer(HERE.id, "192.0.2.66", 4000, NOBODY)
    for request in REQUESTS:
        if not isinstance(request, Auth):
            with pytest.raises(RequestError) as refused:
                handling.handle(request, stranger)
            assert refused.value.error == "not_permitted", request
    assert (handling.answers, len(handling.table), handling.bus.waiting) == ([], 0, [])
    handling.handle(Auth(token="x"), stranger)
    assert handling.last()["ok"]
    assert EVERYTHING.scopes > NOBODY.scopes


def test_what_the_disk_can_not_keep_is_unavailable(handling: Handling) -> None:
    """A change that can't be written is refused with a sentence that says so, and nothing is changed."""
    handling.handle(Register("there"))
    entry = handling.table.find("there")
    assert entry is not None
    handling.disk_full = True
    announced = handling.bus.announced
    for request in (Register("c"), SignUp("c"), Leave(name="there", generation=entry.client.generation)):
        with pytest.raises(RequestError) as refused:
            handling.handle(request)
        assert refused.value.error == "unavailable"
        assert str(refused.value) == "the registry can't be written to disk just now; try again"
    assert (handling.table.present, handling.bus.announced, len(handling.answers)) == (["there"], announced, 1)


def test_frames_that_the_bus_does_not_take_are_unavailable(handling: Handling) -> None:
    """The client hears at once when no request can be passed on."""
    handling.bus.full = True
    with pytest.raises(RequestError, match="the bus is full; try again") as refused:
        handling.handle(Transmit(interface="eth0", frame=Octets(bytes(14)), id=3))
    assert refused.value.error == "unavailable"
    assert handling.answers == []


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (TransmitReply(1, 3), {"ok": True, "id": 3, "sent": 3}),
        (None, {"ok": False, "id": 3, "error": "unavailable"}),
        (TransmitReply(1, 0, "not_permitted", "no"), {"ok": False, "id": 3, "error": "not_permitted", "message": "no"}),
        (TransmitReply(1, 0, "new_word", "no"), {"ok": False, "id": 3, "error": "unavailable", "message": "no"}),
    ],
)
def test_reply_of_the_transmitter_is_the_answer(
    handling: Handling, reply: TransmitReply | None, expected: dict[str, Any]
) -> None:
    """Frames are answered when the transmitter has, or has not in time; refusals are counted like others."""
    handling.handle(Transmit(interface="eth0", frame=Octets(bytes(14)), id=3))
    assert handling.answers == []
    handling.bus.waiting[0](reply)
    answer = handling.last()
    if reply is None:
        assert "did not answer" in answer.pop("message")
    assert answer == expected
    refused = {name: count for name, count in handling.handler.counters.items() if name.startswith("refused_")}
    assert refused == ({} if expected["ok"] else {f"refused_{expected['error']}": 1})


def test_renewal_is_announced_to_nobody(handling: Handling) -> None:
    """Most requests are renewals, and change nothing that others are told."""
    handling.handle(Register("c", ttl=60.0))
    generation, announced = handling.last()["client"]["generation"], handling.bus.announced
    handling.table.now = 10.0
    handling.handle(Renew(name="c", generation=generation, id="r"))
    assert handling.last() == {"ok": True, "id": "r", "expires_in": 60.0}
    assert handling.bus.announced == announced
