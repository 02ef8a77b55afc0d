"""The handler between a decision and its answer; what it decides by, and what it changes, is tested with them."""

import errno
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, get_args
from unittest.mock import patch

import pytest
from structlog.testing import capture_logs

from services.gateway import handler
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
    Release,
    Renew,
    Request,
    RequestError,
    SignUp,
    Transmit,
    WatchClients,
    Withhold,
)
from services.gateway.registry.entry import NO_ORDERS, Event, Orders
from services.gateway.registry.reached_places import NO_PASTS, PastByName
from services.gateway.render import event_line, health_line
from shared.bus.messages import TransmitReply
from shared.client import Source
from shared.settings.entries import Token
from shared.settings.model import Settings
from shared.settings.own_listeners import OwnListeners
from shared.settings.tables import Gateway
from shared.settings.values import Scope
from tests.services.gateway.table import HERE, Table

REQUESTS: list[Request] = [
    SignUp("c"),
    Auth(token="x"),
    Register("c"),
    Renew(name="c", generation=1),
    Leave(name="c", generation=1),
    Withhold(name="c"),
    Release(name="c"),
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
        self.asked: list[Callable[[], None]] | None = None
        """Callbacks for when copies flow, where that takes time."""

    def announce_soon(self) -> None:
        self.announced += 1

    def ask_served(self, _source: Source, finished: Callable[[], None]) -> None:
        if self.asked is None:
            finished()
        else:
            self.asked.append(finished)

    def send_frames(self, _request: Transmit, _holder: str, finished: Callable[[TransmitReply | None], None]) -> None:
        if self.full:
            raise OSError(errno.ENOBUFS, "the bus is full")
        self.waiting.append(finished)


class Handling:
    """A handler, and the answers that it has given."""

    def __init__(self) -> None:
        self.disk_full = False
        self.bus = Bus()
        self.table = Table(keep=lambda *kept: self._keep(*kept))
        destinations = Destinations(["messages"], OwnListeners(()), lambda _: False, lambda _: False)
        settings = Settings(gateway=Gateway(allow_transmit=True))
        proofs = AddressProofs(lambda *_: None, lambda: 0.0)
        admission = Admission(settings.gateway, self.table, destinations, proofs, lambda _: True, lambda: True)
        feed = EventFeed(self.table, partial(event_line, self.table), partial(health_line, self.table))
        clock, tokens = lambda: self.table.now, Tokens(())
        self.handler = Handler(
            settings, self.table, admission, self.bus, feed, self.bus.send_frames, clock, tokens, "e", lambda: 1700.0
        )
        self.answers: list[bytes] = []
        self.handler.add_connection(HERE, lambda _: None, lambda: None)

    def _keep(
        self, _events: Sequence[Event], _generation: int, _withheld: Orders = NO_ORDERS, _pasts: PastByName = NO_PASTS
    ) -> None:
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
    handling.handle(Register("there", streams=("messages",), port=9))
    entry = handling.table.find("there")
    assert entry is not None
    handling.disk_full = True
    announced = handling.bus.announced
    leave = Leave(name="there", generation=entry.client.generation)
    for request in (Register("c"), SignUp("c"), leave, Withhold(name="there")):
        with pytest.raises(RequestError) as refused:
            handling.handle(request)
        assert refused.value.error == "unavailable"
        assert str(refused.value) == "the registry can't be written to disk just now; try again"
    assert (handling.table.present, handling.bus.announced, len(handling.answers)) == (["there"], announced, 1)


@pytest.mark.parametrize(("scopes", "granted"), [(("collect",), True), (("list",), False), ((), False)])
def test_change_that_waits_goes_by_the_rights_of_its_moment(
    handling: Handling, scopes: tuple[Scope, ...], granted: bool
) -> None:
    """A reload that takes a token's rights while its request waits for the cluster is heeded, any other is not felt."""

    def tokens(*scopes: Scope) -> Tokens:
        return Tokens([Token(name="siem", certificate="siem", scopes=scopes)] if scopes else ())

    asked: list[Callable[[], None]] = []

    def make(act: Callable[[], Any], done: Callable[[Any], None], failed: Callable[[Exception], None]) -> None:
        def decide() -> None:
            try:
                done(act())
            except RequestError as refused:
                failed(refused)

        asked.append(decide)

    with patch.object(handling.table.changes, "make", make):
        handling.handler.tokens = tokens("collect")
        handling.handle(Register("c"), replace(HERE, rights=handling.handler.tokens.rights_of_holder("siem")))
        handling.handler.tokens = tokens(*scopes)
        asked[0]()
    answer = handling.last()
    assert (answer["ok"], handling.table.present) == (granted, ["c"] if granted else [])
    assert granted or answer["message"] == "the [[token]] of 'siem' has changed meanwhile; connect again"


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


def test_order_to_withhold_outlasts_the_entry(handling: Handling) -> None:
    """A withheld collector stays so when it renews, moves, leaves and comes back, until an admin releases its name."""
    siem = Register("siem", streams=("messages",), port=9, ttl=60.0)
    handling.handle(siem)
    generation = handling.last()["client"]["generation"]
    handling.handle(Withhold(name="siem", reason="too slow", id=1))
    order = {"by": "", "since": 1700.0, "reason": "too slow"}
    shown = handling.last()["client"]
    assert (shown["generation"], shown["health"], shown["withheld"]) == (generation, "withheld", order)
    handling.handle(Renew(name="siem", generation=generation))
    assert handling.last()["ok"]
    for request in (siem, Register("siem", streams=("messages",), port=10)):
        handling.handle(request)
        answer = handling.last()
        assert (answer["client"]["withheld"], answer["receives"]) == (order, False)
        assert "an admin withholds" in answer["message"]
    handling.handle(Leave(name="siem", generation=answer["client"]["generation"]))
    handling.handle(siem)
    assert handling.last()["client"]["withheld"] == order
    handling.handle(Withhold(name="siem", reason="still"))
    assert handling.last()["client"]["withheld"] == order | {"reason": "still"}
    handling.handle(Release(name="siem"))
    shown = handling.last()["client"]
    assert (shown["withheld"], shown["health"]) == (None, "fresh")
    handling.handle(siem)
    assert handling.last()["receives"]


def test_name_that_has_gone_is_released(handling: Handling) -> None:
    """An order for a collector that is not here any more can be ended; one that never was can't be withheld."""
    handling.handle(Register("siem", streams=("messages",), port=9))
    handling.handle(Withhold(name="siem"))
    handling.handle(Leave(name="siem", generation=handling.last()["client"]["generation"]))
    handling.handle(Release(name="siem"))
    assert (handling.last(), handling.table.withheld) == ({"ok": True, "client": None}, {})
    handling.handle(Register("nameonly"))
    for request in (Release(name="siem"), Withhold(name="siem"), Withhold(name="nameonly")):
        with pytest.raises(RequestError) as refused:
            handling.handle(request)
        assert refused.value.error == "bad_name"


def test_a_fault_that_comes_to_light_later_costs_its_request_alone(handling: Handling) -> None:
    """An answer fails once copies flow, or frames have left: that is logged and answered; others are not touched."""
    handling.bus.asked = []
    for name in ("a", "b"):
        handling.handle(Register(name=name, streams=("messages",), port=514 + ord(name)))
    handling.handle(Withhold(name="a", reason="noisy"))
    with patch.object(handler, "show_client", side_effect=KeyError("since")), capture_logs() as logs:
        for finished in handling.bus.asked[1:]:
            finished()
    handling.bus.asked[0]()
    handling.handle(Transmit(interface="eth0", frame=Octets(bytes(14))))
    with patch.object(Handler, "_report_frames", side_effect=KeyError("sent")), capture_logs() as more:
        handling.bus.waiting[0](TransmitReply(1, 1, ""))
    failed = {"ok": False, "error": "unavailable", "message": "the gateway failed at this request, as its log says"}
    answers = [json.loads(answer) for answer in handling.answers]
    assert [answer["ok"] for answer in answers] == [False, False, True, False]
    assert [answer for answer in answers if not answer["ok"]] == [failed] * 3
    assert [each["reason"] for each in [*logs, *more] if each["log_level"] == "error"] == [
        *["KeyError('since')"] * 2,
        "KeyError('sent')",
    ]
