"""Handles requests: gets each decided, changes the registry, and returns the bytes of the answer. No I/O."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final, ParamSpec, Protocol, get_args

import msgspec

from services.gateway.admission.decision import Admission, Grant
from services.gateway.admission.peer import Peer
from services.gateway.admission.tokens import Tokens
from services.gateway.counters import CROSS_PROTOCOL, REFUSED, REQUESTS, TOO_SLOW, WRONG_TOKENS
from services.gateway.event_feed import EventFeed, Push
from services.gateway.protocol.requests import (
    Auth,
    Confirm,
    ErrorWord,
    Id,
    Leave,
    ListClients,
    ListStreams,
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
from services.gateway.registry.changes import FAULT, T, ignore
from services.gateway.registry.entry import Entry, Origin
from services.gateway.registry.registry import Registry
from services.gateway.render import json_line, show_client
from shared.bus.frame_requests import describe_failure
from shared.bus.messages import TransmitReply
from shared.client import Source, Withheld
from shared.log import RELEASED_BY_ADMIN, WITHHELD_BY_ADMIN, get_logger
from shared.net.printable import printable
from shared.settings.model import Settings

Answer = Sequence[bytes]
"""Parts to be sent one after the other; they may be shared with other answers."""
Reply = Callable[[Answer], None]
SendFrames = Callable[[Transmit, str, Callable[[TransmitReply | None], None]], None]
"""Asks the transmitter to send frames for a holder; the callback gets its reply, None when none came in time. OSError:
it can't."""
LISTING_SECONDS: Final = 1.0
"""The age that `expires_in` and `health_since` in a list may have: all clients that ask meanwhile get one rendering."""
RECEIVES_NOTHING: Final = "on the list, but receives nothing; register with streams and port to get copies"
COPIES_WITHHELD: Final = "on the list, but an admin withholds the copies; `withheld` says since when and why"
MAX_WRONG_TOKENS: Final = 3
"""Wrong tokens of one connection; then it is closed, and a further try costs another handshake."""
WORDS: Final[tuple[ErrorWord, ...]] = get_args(ErrorWord)

P = ParamSpec("P")

log = get_logger()
_encode: Final = msgspec.json.Encoder().encode


class Announces(Protocol):
    """The part of the announcer that the handler needs."""

    def announce_soon(self) -> None:
        """Announce on the bus, soon, that the registry has changed."""

    def ask_served(self, source: Source, finished: Callable[[], None]) -> None:
        """Call `finished` once copies flow to all collectors of `source`, or when no service said so in time."""


class Handler:
    """Handles one request at a time of each connection, and hands its answer to `reply`, now or later."""

    def __init__(
        self,
        settings: Settings,
        registry: Registry,
        admission: Admission,
        announcer: Announces,
        feed: EventFeed,
        send_frames: SendFrames,
        clock: Callable[[], float],
        tokens: Tokens,
        epoch: str,
        unix_time: Callable[[], float],
    ) -> None:
        self.tokens = tokens
        self.epoch = epoch
        self.counters: Counter[str] = Counter()
        self.apply_settings(settings)
        self._registry = registry
        self._admission = admission
        self._announcer = announcer
        self._feed = feed
        self._send_frames = send_frames
        self._clock = clock
        self._unix_time = unix_time
        self._pushes: dict[int, Push] = {}
        self._cuts: dict[int, Callable[[], None]] = {}
        self._wrong_tokens: Counter[int] = Counter()
        self._listing = b""
        self._listing_version: tuple[int, ...] = ()
        self._listing_until = 0.0

    def apply_settings(self, settings: Settings) -> None:
        """List the streams of these settings from now on."""
        self._streams = {stream.name: {"listen": stream.listen} for stream in settings.streams}

    def handle(self, request: Request, peer: Peer, reply: Reply) -> None:
        """Do what `request` asks for; `RequestError` when it can't be granted."""
        self.counters[REQUESTS] += 1
        try:
            self._dispatch(request, peer, reply)
        except OSError as error:  # of the kernel or the disk
            raise unavailable(error) from None
        if not isinstance(request, Renew):  # renewals are most of the requests, and no news for others
            self._announcer.announce_soon()

    def _dispatch(self, request: Request, peer: Peer, reply: Reply) -> None:
        """Get each request decided, by what it changes or only by the rights of the peer, and perform it."""
        match request:
            case SignUp() | Register() | Confirm():
                self._register(request, peer, reply)
            case Renew():
                refuse = self._refusing(request, peer, reply)
                self._registry.changes.renew(
                    lambda: self._admission.decide_change(request, peer),
                    _caught(lambda entry: reply(self._renewed(request, entry)), refuse),
                    refuse,
                )
            case Leave():
                self._make(
                    lambda: self._registry.release(self._admission.decide_change(request, peer)),
                    lambda _: reply(_succeed(request.id)),
                    request,
                    peer,
                    reply,
                )
            case Withhold() | Release():
                self._order(request, peer, reply)
            case Transmit():
                self._admission.decide_transmit(request, peer)
                holder = peer.rights.holder
                refuse = self._refusing(request, peer, reply)
                report = _caught(lambda outcome: reply(self._report_frames(request, outcome)), refuse)
                self._send_frames(request, holder, report)
            case _:
                peer.rights.check(request)
                reply(self._inform(request, peer))

    def authenticate(self, request: Auth, peer: Peer) -> Peer:
        """Return the peer with the rights that its token gives; `RequestError` when it gives none."""
        if peer.rights.holder:
            raise RequestError(
                "not_permitted", f"this connection is authenticated as {peer.rights.holder!r} already; open another"
            )
        try:
            return replace(peer, rights=self.tokens.rights_of_token(request.token))
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

    def needs_connection(self, peer: Peer) -> bool:
        """Return whether an idle connection of the peer is still of use: it holds an entry, or watches."""
        return self._registry.holds_any(peer) or self._feed.has_watcher(peer.id)

    def add_connection(self, peer: Peer, push: Push, cut: Callable[[], None]) -> None:
        """Note a new connection, and the functions that send its client unrequested lines, and cut it."""
        self._pushes[peer.id], self._cuts[peer.id] = push, cut

    def remove_connection(self, peer: Peer, *, by_us: bool) -> None:
        """Forget a closed connection; the entries that it held go too, unless the gateway itself is ending."""
        self._pushes.pop(peer.id, None)
        self._cuts.pop(peer.id, None)
        self._wrong_tokens.pop(peer.id, None)
        self._feed.remove_watcher(peer.id)
        if not by_us and self._registry.holds_any(peer):
            self._registry.changes.make(lambda: self._registry.release_held(peer), ignore)
        self._announcer.announce_soon()

    def note_lost(self, entry: Entry, successor: Entry | None) -> None:
        """Tell a connection that another node has ended its entry; one that held it is cut, as by a restart here."""
        if successor is None and entry.held and entry.peer.id in self._cuts:
            self._cuts[entry.peer.id]()
        elif successor is not None and entry.origin is successor.origin is Origin.JSON:
            self._push_taken_over(entry, successor.peer)

    def is_connected(self, peer: Peer) -> bool:
        """Return whether a peer's connection is open."""
        return peer.id in self._pushes

    def _make(
        self, act: Callable[[], T], done: Callable[[T], None], request: Request, peer: Peer, reply: Reply
    ) -> None:
        """Make a change by the rights that the peer has then: where it waits for a cluster, tokens may have changed."""

        def act_by_right() -> T:
            holder = peer.rights.holder
            if holder and self.tokens.rights_of_holder(holder) != peer.rights:
                raise RequestError("not_permitted", f"the [[token]] of {holder!r} has changed meanwhile; connect again")
            return act()

        refuse = self._refusing(request, peer, reply)
        self._registry.changes.make(act_by_right, _caught(done, refuse), refuse)

    def _refusing(self, request: Request, peer: Peer, reply: Reply) -> Callable[[Exception], None]:
        """Return a function that answers a request with a refusal which came later, be it for a fault of ours."""

        def refuse(error: Exception) -> None:
            if isinstance(error, OSError):
                error = unavailable(error)
            if not isinstance(error, RequestError):
                log.error("error while handling a request", peer=str(peer), reason=repr(error), exc_info=error)
                error = RequestError("unavailable", FAULT)
            reply(self.refuse(error, None if isinstance(request, SignUp) else request.id))

        return refuse

    def _register(self, request: SignUp | Register | Confirm, peer: Peer, reply: Reply) -> None:
        asked = self._admission.read(request, peer)

        def grant() -> tuple[Grant, Entry]:
            granted = self._admission.decide(asked, peer)
            client, origin, ttl, hold, proven, _, _ = granted
            return granted, self._registry.grant(client, peer, origin, ttl=ttl, hold=hold, proven=proven)

        def done(granted: tuple[Grant, Entry]) -> None:
            self._note_granted(*granted, peer)
            if isinstance(request, SignUp):
                reply(self._registry.names.render())
            else:
                self._answer_registered(request, *granted, peer, reply)

        self._make(grant, done, request, peer, reply)

    def _answer_registered(
        self, request: Register | Confirm, granted: Grant, entry: Entry, peer: Peer, reply: Reply
    ) -> None:
        def finished() -> None:
            self._registry.refresh_condition(entry)
            receives = bool(entry.client.streams) and not entry.client.withheld
            note = {"message": granted.note} if granted.note else {}
            if not receives:
                note = {"message": COPIES_WITHHELD if entry.client.withheld else RECEIVES_NOTHING}
            reply(_succeed(request.id, client=show_client(self._registry, entry), receives=receives, **note))

        if entry.client.streams:
            self._announcer.ask_served(entry.client.source, _caught(finished, self._refusing(request, peer, reply)))
        else:
            finished()

    def _order(self, request: Withhold | Release, peer: Peer, reply: Reply) -> None:
        """Withhold a collector's copies, or let them flow again; answer once its sender knows."""
        name, registry = request.name, self._registry

        def order() -> None:
            if isinstance(request, Withhold):
                entry = self._admission.decide_withhold(request, peer)
                before = registry.withheld.get(name)
                since = before.since if before else self._unix_time()
                registry.withhold(entry, Withheld(peer.rights.holder, since, request.reason))
            else:
                self._admission.decide_release(request, peer)
                registry.end_withholding(name)

        def finished() -> None:
            if entry := registry.find(name):
                registry.refresh_condition(entry)
            reply(_succeed(request.id, client=show_client(registry, entry) if entry else None))

        def done(_: None) -> None:
            if isinstance(request, Withhold):
                log.info(WITHHELD_BY_ADMIN, client=name, by=str(peer), reason=printable(request.reason))
            else:
                log.info(RELEASED_BY_ADMIN, client=name, by=str(peer))
            present = registry.find(name)
            if present and present.client.streams:
                answer = _caught(finished, self._refusing(request, peer, reply))
                self._announcer.ask_served(present.client.source, answer)
            else:
                finished()

        self._make(order, done, request, peer, reply)

    def _note_granted(self, granted: Grant, entry: Entry, peer: Peer) -> None:
        replaced = granted.replaced
        if replaced is not None and replaced.peer.id != peer.id and entry.origin is replaced.origin is Origin.JSON:
            self._push_taken_over(replaced, peer)

    def _push_taken_over(self, replaced: Entry, peer: Peer) -> None:
        if push := self._pushes.get(replaced.peer.id):
            client = replaced.client
            why = f"{client.name!r} was taken over from {peer}"
            push(json_line(event="taken_over", name=client.name, generation=client.generation, message=why))

    def _renewed(self, request: Renew, entry: Entry) -> Answer:
        return _succeed(request.id, expires_in=self._registry.leases.expires_in(entry))

    def _report_frames(self, request: Transmit, reply: TransmitReply | None) -> Answer:
        """Return the answer for the transmitter's reply; a word that clients do not know becomes another."""
        if reply is None:
            late = "the transmitter did not answer in time; some frames may have left"
            return self.refuse(RequestError("unavailable", late), request.id)
        if not reply.error:
            return _succeed(request.id, sent=reply.sent)
        word: ErrorWord = next((word for word in WORDS if word == reply.error), "unavailable")
        return self.refuse(RequestError(word, describe_failure(reply, request.count)), request.id)

    def _inform(self, request: Auth | ListClients | ListStreams | WatchClients, peer: Peer) -> Answer:
        match request:
            case Auth():
                rights, scopes = peer.rights, sorted(peer.rights.scopes)
                return _succeed(request.id, holder=rights.holder, scopes=scopes, streams=rights.streams)
            case ListClients():
                return [*self._feed.pop_waiting(peer.id), _head(request.id), b',"clients":', *self._list()]
            case ListStreams():
                return _succeed(request.id, streams=self._streams)
            case WatchClients():
                return self._watch(request, peer)

    def _watch(self, request: WatchClients, peer: Peer) -> Answer:
        # A peer that watches already gets events that are not pushed yet with the answer, and not twice.
        self._feed.remove_watcher(peer.id)
        self._feed.push_health()  # to the other watchers: the answer holds the present state
        missed = None
        if request.revision is not None and request.epoch == self.epoch:
            missed = self._feed.lines_since(request.revision)
        self._feed.add_watcher(peer.id, self._pushes[peer.id])
        if missed is None:
            return [_head(request.id), b',"clients":', *self._list()]
        return [
            *_succeed(request.id, revision=request.revision, epoch=self.epoch),
            missed,
            self._feed.health_lines(),
        ]

    def _list(self) -> Answer:
        version, now = self._registry.version(), self._clock()
        ages = self._registry.leases.active or self._registry.collectors
        if version != self._listing_version or (ages and now >= self._listing_until):
            self._registry.refresh_conditions()
            clients = {entry.client.name: show_client(self._registry, entry) for entry in self._registry.entries()}
            self._listing = _encode(clients)
            self._listing_version, self._listing_until = version, now + LISTING_SECONDS
        rest = {"withheld": self._registry.withheld, "revision": self._registry.revision, "epoch": self.epoch}
        return [self._listing, b"," + json_line(**rest)[1:]]


def unavailable(error: OSError) -> RequestError:
    """Return the refusal for an error of the kernel, the disk or the cluster."""
    return RequestError("unavailable", f"{error.strerror}; try again")


def _caught(callback: Callable[P, None], failed: Callable[[Exception], None]) -> Callable[P, None]:
    """Return a callback which hands to `failed` what `callback` raises: others wait for the same event."""

    def call(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            callback(*args, **kwargs)
        except Exception as error:
            failed(error)

    return call


def _identity(id: Id | None) -> dict[str, object]:
    return {} if id is None else {"id": id}


def _head(id: Id | None) -> bytes:
    """Return a granted answer without its closing brace."""
    return _encode({"ok": True} | _identity(id))[:-1]


def _succeed(id: Id | None, **facts: object) -> Answer:
    return [json_line(ok=True, **_identity(id), **facts)]
