"""Answers requests: what each does to the registry, and the bytes that go back. No I/O."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final, Protocol

import msgspec

from services.gateway.admission.address_proof import Challenges
from services.gateway.admission.destinations import Admission
from services.gateway.admission.peer import Visitor
from services.gateway.admission.rights import Permissions
from services.gateway.counters import CROSS_PROTOCOL, REFUSED, REQUESTS, TOO_SLOW, WRONG_TOKENS
from services.gateway.events import Feed, Push
from services.gateway.protocol.requests import (
    Auth,
    Confirm,
    Id,
    Leave,
    List,
    Name,
    Register,
    Renew,
    Request,
    RequestError,
    Streams,
    Transmit,
    Watch,
    no_transmitter,
)
from services.gateway.registry.entry import Entry, Origin
from services.gateway.registry.registry import Registry
from services.gateway.render import json_line, view
from shared.client import Client, Source
from shared.settings.model import Settings

Answer = Sequence[bytes]
"""Parts to be sent one after the other; they may be shared with other answers."""
HaveSent = Callable[[Transmit, Callable[[int | RequestError], None]], None]
"""Has the transmitter send; what is called in the end gets how many frames have left, or why not."""
LISTING_SECONDS: Final = 1.0
"""How old `expires_in` and `health_since` in a list may be: so long one rendering serves all who ask."""
MAX_WRONG_TOKENS: Final = 3
"""Of one connection; then it is closed, and trying costs a handshake again."""

_encode: Final = msgspec.json.Encoder().encode


class Announces(Protocol):
    """What the desk needs of the bus."""

    def wake(self) -> None:
        """The registry has changed: tell the bus soon."""

    def sends(self, source: Source) -> bool:
        """Whether anybody is there who sends copies of this source."""

    def ask_served(self, source: Source, finished: Callable[[], None]) -> None:
        """Call `finished` once copies flow to all collectors of `source`, or nobody said so in time."""


class Desk:
    """Takes one request at a time from each connection and hands its answer to `reply`, now or later."""

    def __init__(
        self,
        settings: Settings,
        registry: Registry,
        admission: Admission,
        challenges: Challenges,
        announcer: Announces,
        feed: Feed,
        have_sent: HaveSent,
        clock: Callable[[], float],
        permissions: Permissions,
    ) -> None:
        self.permissions = permissions
        self.counters: Counter[str] = Counter()
        self._lease_seconds = settings.gateway.lease_seconds
        self.follow(settings, admission)
        self._feed = feed
        self._present: dict[int, Push] = {}
        self._wrong_tokens: Counter[int] = Counter()
        self._challenges = challenges
        self._registry = registry
        self._announcer = announcer
        self._have_sent = have_sent
        self._clock = clock
        self._listing = b""
        self._listing_version: tuple[int, ...] = ()
        self._listing_until = 0.0

    def follow(self, settings: Settings, admission: Admission) -> None:
        """Know these streams from now on, and admit by them."""
        self._streams = {stream.name: {"listen": stream.listen} for stream in settings.streams}
        self._admission = admission

    def answer(self, request: Request, visitor: Visitor, reply: Callable[[Answer], None]) -> None:
        """Do what `request` says; `RequestError` when it can't be granted."""
        self.counters[REQUESTS] += 1
        visitor.rights.check(request)
        if isinstance(request, Name):
            reply(self._sign_up(request, visitor))
        elif isinstance(request, Register):
            self._register(request, visitor, reply)
        elif isinstance(request, Transmit):
            self._transmit(request, reply)
        elif isinstance(request, Watch):
            self._watch(request, visitor, reply)
        elif isinstance(request, Confirm):
            self._confirm(request, visitor, reply)
        elif isinstance(request, Auth):
            reply(self._show_rights(request, visitor))
        else:
            reply(self._operate(request, visitor))
        if not isinstance(request, Renew):  # which is most of what is asked, and nothing that others are told
            self._announcer.wake()

    def authenticate(self, request: Auth, visitor: Visitor) -> Visitor:
        """Return the visitor with the rights that its token gives; `RequestError` when it gives none."""
        if visitor.rights.holder:
            raise RequestError("not_permitted", f"this connection is {visitor.rights.holder!r} already; open another")
        try:
            return replace(visitor, rights=self.permissions.of_token(request.token))
        except RequestError as refused:
            self.counters[WRONG_TOKENS] += 1
            self._wrong_tokens[visitor.id] += 1
            refused.closes = self._wrong_tokens[visitor.id] >= MAX_WRONG_TOKENS
            raise

    def refuse(self, refused: RequestError, id: Id | None = None) -> Answer:
        """Count a refusal and return its answer."""
        self.counters[TOO_SLOW if refused.error == "too_slow" else REFUSED + refused.error] += 1
        self.counters[CROSS_PROTOCOL] += refused.cross_protocol
        said = {"error": refused.error, "message": str(refused)}
        return [_encode({"ok": False} | _identity(refused.id if id is None else id) | said) + b"\n"]

    def refuse_slow(self) -> bytes:
        """Count who reads too slowly what it watches, and return what it is told: where to go on from."""
        self.counters[TOO_SLOW] += 1
        return json_line(
            ok=False,
            error="too_slow",
            message="you read more slowly than the list changes; watch again from the last revision that you have",
        )

    def stays(self, visitor: Visitor) -> bool:
        """Whether the visitor's connection is of use though nothing comes by it: it holds an entry, or watches."""
        return self._registry.holds_any(visitor) or self._feed.watches(visitor.id)

    def arrive(self, visitor: Visitor, push: Push) -> None:
        """A visitor is there, and may be told what it did not ask for."""
        self._present[visitor.id] = push

    def depart(self, visitor: Visitor, *, by_us: bool) -> None:
        """The visitor's connection is gone, and with it the entries it held, unless it is we who go."""
        self._present.pop(visitor.id, None)
        self._wrong_tokens.pop(visitor.id, None)
        self._feed.leave(visitor.id)
        if not by_us:
            self._registry.release_held(visitor)
        self._announcer.wake()

    def _sign_up(self, request: Name, visitor: Visitor) -> Answer:
        client = Client(request.name, 0, visitor.address, visitor.port)
        self._registry.grant(client, visitor, Origin.NAMES, ttl=self._lease_seconds)
        return self._registry.names.render()

    def _register(self, request: Register, visitor: Visitor, reply: Callable[[Answer], None]) -> None:
        client = self._admission.admit(request, visitor)
        if not (self._admission.proven(request, visitor) or self._proven_before(client, visitor)):
            raise self._challenges.challenge(request, client.address)
        self._enter(request, client, visitor, reply)

    def _proven_before(self, client: Client, visitor: Visitor) -> bool:
        """Whether the entry that this one replaces goes to the same place, on behalf of the same host."""
        present = self._registry.find(client.name)
        return (
            present is not None
            and present.origin is Origin.JSON
            and present.visitor.address == visitor.address
            and (present.client.address, present.client.port) == (client.address, client.port)
        )

    def _confirm(self, request: Confirm, visitor: Visitor, reply: Callable[[Answer], None]) -> None:
        wish = self._challenges.confirm(request.name, request.nonce)
        self._enter(msgspec.structs.replace(wish, id=request.id), self._admission.admit(wish, visitor), visitor, reply)

    def _enter(self, request: Register, client: Client, visitor: Visitor, reply: Callable[[Answer], None]) -> None:
        if client.source == "original" and not self._announcer.sends("original"):
            raise no_transmitter()
        loser = self._registry.find(client.name)
        entry = self._registry.grant(
            client, visitor, Origin.JSON, ttl=request.ttl, hold=request.hold, take_over=request.take_over
        )

        if loser is not None and loser.visitor.id != visitor.id:
            self._tell_loser(loser, visitor)

        def finished() -> None:
            self._registry.look(entry)
            reply(_succeed(request.id, client=view(self._registry, entry)))

        if entry.client.streams:
            self._announcer.ask_served(client.source, finished)
        else:
            finished()

    def _tell_loser(self, loser: Entry, visitor: Visitor) -> None:
        push = self._present.get(loser.visitor.id)
        if push is not None and loser.origin is Origin.JSON:
            client = loser.client
            why = f"{client.name!r} was taken over from {visitor}"
            push(json_line(event="taken_over", name=client.name, generation=client.generation, message=why))

    def _watch(self, request: Watch, visitor: Visitor, reply: Callable[[Answer], None]) -> None:
        self._feed.leave(visitor.id)  # who watches already gets what is not pushed yet with the answer, and not twice
        self._feed.tell_health()  # to those who were there before: what it is now is in the answer
        missed = None if request.revision is None else self._feed.since(request.revision)
        self._feed.watch(visitor.id, self._present[visitor.id])
        if missed is None:
            reply([_head(request.id), b',"clients":', *self._list()])
        else:
            reply([*_succeed(request.id, revision=request.revision), missed, self._feed.health()])

    def _transmit(self, request: Transmit, reply: Callable[[Answer], None]) -> None:
        def finished(outcome: int | RequestError) -> None:
            if isinstance(outcome, RequestError):
                reply(self.refuse(outcome, request.id))
            else:
                reply(_succeed(request.id, sent=outcome))

        self._have_sent(request, finished)

    def _show_rights(self, request: Auth, visitor: Visitor) -> Answer:
        rights = visitor.rights
        return _succeed(request.id, holder=rights.holder, scopes=sorted(rights.scopes), streams=rights.streams)

    def _operate(self, request: Renew | Leave | List | Streams, visitor: Visitor) -> Answer:
        match request:
            case Renew():
                entry = self._registry.renew(request.name, request.generation, visitor)
                return _succeed(request.id, expires_in=self._registry.expires_in(entry))
            case Leave():
                self._registry.release(request.name, request.generation, visitor)
                return _succeed(request.id)
            case List():
                return [_head(request.id), b',"clients":', *self._list()]
            case Streams():
                return _succeed(request.id, streams=self._streams)

    def _list(self) -> Answer:
        version, now = self._registry.version(), self._clock()
        ages = self._registry.leased or self._registry.collectors
        if version != self._listing_version or (ages and now >= self._listing_until):
            self._registry.look_at_all()
            clients = {entry.client.name: view(self._registry, entry) for entry in self._registry.entries()}
            self._listing = _encode(clients)
            self._listing_version, self._listing_until = version, now + LISTING_SECONDS
        return [self._listing, b',"revision":%d}\n' % version[0]]


def _identity(id: Id | None) -> dict[str, object]:
    return {} if id is None else {"id": id}


def _head(id: Id | None) -> bytes:
    """A granted answer but for its closing brace."""
    return _encode({"ok": True} | _identity(id))[:-1]


def _succeed(id: Id | None, **facts: object) -> Answer:
    return [json_line(ok=True, **_identity(id), **facts)]
