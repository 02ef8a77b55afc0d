"""Answers requests: what each does to the registry, and the bytes that go back. No I/O."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final, Protocol

import msgspec

from services.gateway.admission.address_proof import AddressProofs
from services.gateway.admission.destinations import Admission
from services.gateway.admission.peer import Peer
from services.gateway.admission.rights import Tokens
from services.gateway.counters import CROSS_PROTOCOL, REFUSED, REQUESTS, TOO_SLOW, WRONG_TOKENS
from services.gateway.events import EventFeed, Push
from services.gateway.protocol.requests import (
    Auth,
    Confirm,
    Id,
    Leave,
    ListClients,
    ListStreams,
    Register,
    Renew,
    Request,
    RequestError,
    SignUp,
    Transmit,
    WatchClients,
    no_transmitter,
)
from services.gateway.registry.entry import Entry, Origin
from services.gateway.registry.registry import Registry
from services.gateway.render import json_line, show_client
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
    """What the handler needs of the bus."""

    def wake(self) -> None:
        """The registry has changed: tell the bus soon."""

    def sends(self, source: Source) -> bool:
        """Whether anybody is there who sends copies of this source."""

    def ask_served(self, source: Source, finished: Callable[[], None]) -> None:
        """Call `finished` once copies flow to all collectors of `source`, or nobody said so in time."""


class Handler:
    """Takes one request at a time from each connection and hands its answer to `reply`, now or later."""

    def __init__(
        self,
        settings: Settings,
        registry: Registry,
        admission: Admission,
        challenges: AddressProofs,
        announcer: Announces,
        feed: EventFeed,
        have_sent: HaveSent,
        clock: Callable[[], float],
        tokens: Tokens,
    ) -> None:
        self.tokens = tokens
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

    def answer(self, request: Request, peer: Peer, reply: Callable[[Answer], None]) -> None:
        """Do what `request` says; `RequestError` when it can't be granted."""
        self.counters[REQUESTS] += 1
        peer.rights.check(request)
        if isinstance(request, SignUp):
            reply(self._sign_up(request, peer))
        elif isinstance(request, Register):
            self._register(request, peer, reply)
        elif isinstance(request, Transmit):
            self._transmit(request, reply)
        elif isinstance(request, WatchClients):
            self._watch(request, peer, reply)
        elif isinstance(request, Confirm):
            self._confirm(request, peer, reply)
        elif isinstance(request, Auth):
            reply(self._show_rights(request, peer))
        else:
            reply(self._operate(request, peer))
        if not isinstance(request, Renew):  # which is most of what is asked, and nothing that others are told
            self._announcer.wake()

    def authenticate(self, request: Auth, peer: Peer) -> Peer:
        """Return the peer with the rights that its token gives; `RequestError` when it gives none."""
        if peer.rights.holder:
            raise RequestError("not_permitted", f"this connection is {peer.rights.holder!r} already; open another")
        try:
            return replace(peer, rights=self.tokens.of_token(request.token))
        except RequestError as refused:
            self.counters[WRONG_TOKENS] += 1
            self._wrong_tokens[peer.id] += 1
            refused.closes = self._wrong_tokens[peer.id] >= MAX_WRONG_TOKENS
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

    def stays(self, peer: Peer) -> bool:
        """Whether the peer's connection is of use though nothing comes by it: it holds an entry, or watches."""
        return self._registry.holds_any(peer) or self._feed.watches(peer.id)

    def arrive(self, peer: Peer, push: Push) -> None:
        """A peer is there, and may be told what it did not ask for."""
        self._present[peer.id] = push

    def depart(self, peer: Peer, *, by_us: bool) -> None:
        """The peer's connection is gone, and with it the entries it held, unless it is we who go."""
        self._present.pop(peer.id, None)
        self._wrong_tokens.pop(peer.id, None)
        self._feed.leave(peer.id)
        if not by_us:
            self._registry.release_held(peer)
        self._announcer.wake()

    def _sign_up(self, request: SignUp, peer: Peer) -> Answer:
        client = Client(request.name, 0, peer.address, peer.port)
        self._registry.grant(client, peer, Origin.NAMES, ttl=self._lease_seconds)
        return self._registry.names.render()

    def _register(self, request: Register, peer: Peer, reply: Callable[[Answer], None]) -> None:
        client = self._admission.admit(request, peer)
        if not (self._admission.proven(request, peer) or self._proven_before(client, peer)):
            raise self._challenges.challenge(request, client.address)
        self._enter(request, client, peer, reply)

    def _proven_before(self, client: Client, peer: Peer) -> bool:
        """Whether the entry that this one replaces goes to the same place, on behalf of the same host."""
        present = self._registry.find(client.name)
        return (
            present is not None
            and present.origin is Origin.JSON
            and present.peer.address == peer.address
            and (present.client.address, present.client.port) == (client.address, client.port)
        )

    def _confirm(self, request: Confirm, peer: Peer, reply: Callable[[Answer], None]) -> None:
        wish = self._challenges.confirm(request.name, request.nonce)
        self._enter(msgspec.structs.replace(wish, id=request.id), self._admission.admit(wish, peer), peer, reply)

    def _enter(self, request: Register, client: Client, peer: Peer, reply: Callable[[Answer], None]) -> None:
        if client.source == "original" and not self._announcer.sends("original"):
            raise no_transmitter()
        loser = self._registry.find(client.name)
        entry = self._registry.grant(
            client, peer, Origin.JSON, ttl=request.ttl, hold=request.hold, take_over=request.take_over
        )

        if loser is not None and loser.peer.id != peer.id:
            self._tell_loser(loser, peer)

        def finished() -> None:
            self._registry.refresh_condition(entry)
            reply(_succeed(request.id, client=show_client(self._registry, entry)))

        if entry.client.streams:
            self._announcer.ask_served(client.source, finished)
        else:
            finished()

    def _tell_loser(self, loser: Entry, peer: Peer) -> None:
        push = self._present.get(loser.peer.id)
        if push is not None and loser.origin is Origin.JSON:
            client = loser.client
            why = f"{client.name!r} was taken over from {peer}"
            push(json_line(event="taken_over", name=client.name, generation=client.generation, message=why))

    def _watch(self, request: WatchClients, peer: Peer, reply: Callable[[Answer], None]) -> None:
        self._feed.leave(peer.id)  # who watches already gets what is not pushed yet with the answer, and not twice
        self._feed.push_health()  # to those who were there before: what it is now is in the answer
        missed = None if request.revision is None else self._feed.since(request.revision)
        self._feed.watch(peer.id, self._present[peer.id])
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

    def _show_rights(self, request: Auth, peer: Peer) -> Answer:
        rights = peer.rights
        return _succeed(request.id, holder=rights.holder, scopes=sorted(rights.scopes), streams=rights.streams)

    def _operate(self, request: Renew | Leave | ListClients | ListStreams, peer: Peer) -> Answer:
        match request:
            case Renew():
                entry = self._registry.renew(request.name, request.generation, peer)
                return _succeed(request.id, expires_in=self._registry.expires_in(entry))
            case Leave():
                self._registry.release(request.name, request.generation, peer)
                return _succeed(request.id)
            case ListClients():
                return [_head(request.id), b',"clients":', *self._list()]
            case ListStreams():
                return _succeed(request.id, streams=self._streams)

    def _list(self) -> Answer:
        version, now = self._registry.version(), self._clock()
        ages = self._registry.leased or self._registry.collectors
        if version != self._listing_version or (ages and now >= self._listing_until):
            self._registry.refresh_conditions()
            clients = {entry.client.name: show_client(self._registry, entry) for entry in self._registry.entries()}
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
