"""Answers requests: what each does to the registry, and the bytes that go back. No I/O."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Final, Protocol

import msgspec

from services.gateway.admission import Admission
from services.gateway.counters import CROSS_PROTOCOL, REFUSED, REQUESTS, TOO_SLOW
from services.gateway.registry import Entry, Health, Origin, Registry, Visitor
from services.gateway.requests import (
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
    no_transmitter,
)
from shared.registry import Client, Dscp, HopLimit, Source
from shared.settings import Settings

Answer = Sequence[bytes]
"""Parts to be sent one after the other; they may be shared with other answers."""
HaveSent = Callable[[Transmit, Callable[[int | RequestError], None]], None]
"""Has the transmitter send; what is called in the end gets how many frames have left, or why not."""
LISTING_SECONDS: Final = 1.0
"""How old `expires_in` in a list may be: so long one rendering serves all who ask."""

_encode: Final = msgspec.json.Encoder().encode


class View(msgspec.Struct, frozen=True, rename={"prefixes": "from"}):
    """An entry in full, as clients see it."""

    name: str
    address: str
    port: int
    streams: tuple[str, ...]
    source: Source
    prefixes: tuple[str, ...]
    sample: int
    group: str
    hop_limit: HopLimit
    dscp: Dscp
    generation: int
    expires_in: float | None
    health: Health


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
        announcer: Announces,
        have_sent: HaveSent,
        clock: Callable[[], float],
    ) -> None:
        self.counters: Counter[str] = Counter()
        self._lease_seconds = settings.gateway.lease_seconds
        self._streams = {stream.name: {"listen": stream.listen} for stream in settings.streams}
        self._registry = registry
        self._admission = admission
        self._announcer = announcer
        self._have_sent = have_sent
        self._clock = clock
        self._listing = b""
        self._listing_version: tuple[int, ...] = ()
        self._listing_until = 0.0

    def answer(self, request: Request, visitor: Visitor, reply: Callable[[Answer], None]) -> None:
        """Do what `request` says; `RequestError` when it can't be granted."""
        self.counters[REQUESTS] += 1
        if isinstance(request, Name):
            reply(self._sign_up(request, visitor))
        elif isinstance(request, Register):
            self._register(request, visitor, reply)
        elif isinstance(request, Transmit):
            self._transmit(request, reply)
        else:
            reply(self._operate(request))
        self._announcer.wake()

    def refuse(self, refused: RequestError, id: Id | None = None) -> Answer:
        """Count a refusal and return its answer."""
        self.counters[TOO_SLOW if refused.error == "too_slow" else REFUSED + refused.error] += 1
        self.counters[CROSS_PROTOCOL] += refused.cross_protocol
        said = {"error": refused.error, "message": str(refused)}
        return [_encode({"ok": False} | _identity(refused.id if id is None else id) | said) + b"\n"]

    def holds_lease(self, visitor: Visitor) -> bool:
        """Whether an entry lasts as long as this visitor's connection."""
        return self._registry.holds_any(visitor)

    def depart(self, visitor: Visitor) -> None:
        """The visitor's connection is gone, and with it the entries it held."""
        self._registry.release_held(visitor)
        self._announcer.wake()

    def _sign_up(self, request: Name, visitor: Visitor) -> Answer:
        client = Client(request.name, 0, visitor.address, visitor.port)
        self._registry.grant(client, visitor, Origin.NAMES, ttl=self._lease_seconds)
        return self._registry.names.render()

    def _register(self, request: Register, visitor: Visitor, reply: Callable[[Answer], None]) -> None:
        client = self._admission.admit(request, visitor)
        if client.source == "original" and not self._announcer.sends("original"):
            raise no_transmitter()
        entry = self._registry.grant(
            client, visitor, Origin.JSON, ttl=request.ttl, hold=request.hold, take_over=request.take_over
        )

        def finished() -> None:
            reply(_succeed(request.id, client=self._view(entry)))

        if entry.client.streams:
            self._announcer.ask_served(client.source, finished)
        else:
            finished()

    def _transmit(self, request: Transmit, reply: Callable[[Answer], None]) -> None:
        def finished(outcome: int | RequestError) -> None:
            if isinstance(outcome, RequestError):
                reply(self.refuse(outcome, request.id))
            else:
                reply(_succeed(request.id, sent=outcome))

        self._have_sent(request, finished)

    def _operate(self, request: Renew | Leave | List | Streams) -> Answer:
        match request:
            case Renew():
                entry = self._registry.renew(request.name, request.generation)
                return _succeed(request.id, expires_in=self._registry.expires_in(entry))
            case Leave():
                self._registry.release(request.name, request.generation)
                return _succeed(request.id)
            case List():
                return [_head(request.id), b',"clients":', *self._list()]
            case Streams():
                return _succeed(request.id, streams=self._streams)

    def _list(self) -> Answer:
        version, now = self._registry.version(), self._clock()
        if version != self._listing_version or (self._registry.leased and now >= self._listing_until):
            clients = {entry.client.name: self._view(entry) for entry in self._registry.entries()}
            self._listing = _encode(clients)
            self._listing_version, self._listing_until = version, now + LISTING_SECONDS
        return [self._listing, b',"revision":%d}\n' % version[0]]

    def _view(self, entry: Entry) -> View:
        client = entry.client
        return View(
            client.name,
            client.address,
            client.port,
            client.streams,
            client.source,
            client.prefixes,
            client.sample,
            client.group,
            client.hop_limit,
            client.dscp,
            client.generation,
            self._registry.expires_in(entry),
            self._registry.health(entry),
        )


def _identity(id: Id | None) -> dict[str, object]:
    return {} if id is None else {"id": id}


def _head(id: Id | None) -> bytes:
    """A granted answer but for its closing brace."""
    return _encode({"ok": True} | _identity(id))[:-1]


def _succeed(id: Id | None, **facts: object) -> Answer:
    return [_encode({"ok": True} | _identity(id) | facts) + b"\n"]
