"""Decisions whether a client may be registered: in one place, by whichever protocol it comes. No I/O of its own.

An OSError of the kernel, when it is asked about an address, passes through: the handler answers it.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import msgspec

from services.gateway.admission.address_proof import AddressProofs, proven_before
from services.gateway.admission.destinations import Destinations
from services.gateway.admission.ownership import (
    check_changeable,
    check_group,
    check_place,
    check_replaceable,
    check_room,
    check_same_source,
)
from services.gateway.admission.peer import Peer
from services.gateway.admission.since import grant_past
from services.gateway.protocol.requests import (
    Confirm,
    Leave,
    Register,
    Release,
    Renew,
    RequestError,
    SignUp,
    Transmit,
    Withhold,
    no_transmitter,
)
from services.gateway.registry.entry import Entry, Origin
from services.gateway.registry.registry import Registry
from shared.client import Client, Source
from shared.settings.entries import Collector
from shared.settings.tables import Gateway


class Grant(NamedTuple):
    """A client that may be entered, its lease, whether its address is proven, and the entry that it replaces.

    `note` says what it lacks of the past that it has asked for.
    """

    client: Client
    origin: Origin
    ttl: float
    hold: bool
    proven: bool
    replaced: Entry | None
    note: str = ""


class Asked(NamedTuple):
    """A request to be registered, the way that it came, and whether it proves its address."""

    wishes: Register
    origin: Origin
    confirmed: bool


class Admission:
    """Decides about every request that changes the registry or sends; a refusal is raised as `RequestError`.

    `sends_copies` says whether a service is there that sends copies of a source, `sends_frames` likewise of raw frames.
    """

    def __init__(
        self,
        settings: Gateway,
        registry: Registry,
        destinations: Destinations,
        proofs: AddressProofs,
        sends_copies: Callable[[Source], bool],
        sends_frames: Callable[[], bool],
    ) -> None:
        self._settings = settings
        self._registry = registry
        self._proofs = proofs
        self._sends_copies = sends_copies
        self._sends_frames = sends_frames
        self.destinations = destinations

    def read(self, request: SignUp | Register | Confirm, peer: Peer) -> Asked:
        """Return all that a request asks for; a nonce is good for once."""
        peer.rights.check(request)
        origin = Origin.NAMES if isinstance(request, SignUp) else Origin.JSON
        return Asked(self._asked(request, peer), origin, isinstance(request, Confirm))

    def decide(self, request: Asked | SignUp | Register | Confirm, peer: Peer) -> Grant:
        """Return the grant of a request; of several reasons against it, the first in this order is the answer."""
        asked, origin, confirmed = request if isinstance(request, Asked) else self.read(request, peer)
        present = self._registry.find(asked.name)
        client = self.destinations.resolve(asked, peer)
        proven = confirmed or proven_before(present, client, peer)
        if not proven and self.destinations.need_proof(asked, peer):
            raise self._proofs.challenge(asked, client.address, peer)
        if client.source == "original" and not self._sends_copies("original"):
            raise no_transmitter()
        if present is not None:
            check_replaceable(present, peer, origin, take_over=asked.take_over)
        check_group(self._registry, client, peer, origin, present)
        check_room(self._registry, peer.rights.holder, self._settings, present)
        check_place(self._registry, client, peer, origin)
        resume, catch_up, note = grant_past(asked, present, peer.rights.holder, self._registry.pasts)
        client = msgspec.structs.replace(client, resume=resume, catch_up=catch_up)
        return Grant(client, origin, asked.ttl, asked.hold, proven, present, note)

    def _asked(self, request: SignUp | Register | Confirm, peer: Peer) -> Register:
        match request:
            case SignUp(name):
                return Register(name, ttl=self._settings.lease_seconds)
            case Confirm():
                return self._proofs.redeem(request.name, request.nonce, peer)
            case Register():
                return request

    def decide_change(self, request: Renew | Leave, peer: Peer) -> Entry:
        """Return the entry that may be renewed or removed."""
        peer.rights.check(request)
        return check_changeable(self._registry.find(request.name), request.name, request.generation, peer)

    def decide_withhold(self, request: Withhold, peer: Peer) -> Entry:
        """Return the entry of the collector whose copies may be withheld."""
        peer.rights.check(request)
        entry = self._registry.find(request.name)
        if entry is None or not entry.client.streams:
            raise RequestError(
                "bad_name", f"no collector is signed up as {request.name!r}; op list (`fanwire clients`) shows all"
            )
        withheld = self._registry.withheld
        if request.name not in withheld and len(withheld) >= self._settings.max_clients:
            raise RequestError("registry_full", f"{len(withheld)} names are withheld already; release some first")
        return entry

    def decide_release(self, request: Release, peer: Peer) -> None:
        """Return if a name may be released; raise `RequestError` if not."""
        peer.rights.check(request)
        if request.name not in self._registry.withheld:
            raise RequestError("bad_name", f"{request.name!r} is not withheld; there is nothing to release")

    def decide_transmit(self, request: Transmit, peer: Peer) -> None:
        """Return if the frames may be sent; raise `RequestError` if not."""
        peer.rights.check(request)
        if not self._settings.allow_transmit:
            raise RequestError(
                "not_permitted",
                "raw frames from clients are switched off; the operator can set [gateway] allow_transmit = true",
            )
        if not self._sends_frames():
            raise no_transmitter()


def decide_configured(destinations: Destinations, collectors: Iterable[Collector]) -> list[Client]:
    """Return the entries of the collectors in the settings that have addresses; the same are refused to them.

    ValueError names the collector that can't be admitted, by its address or its group.
    """
    clients = []
    sources: dict[str, Source] = {}
    for collector in collectors:
        try:
            check_same_source(collector, sources.setdefault(collector.group, collector.source))
            if not collector.host:
                clients.append(destinations.resolve_configured(collector))
        except (RequestError, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise ValueError(f'[[collector]] "{collector.name}": {reason}') from None
    return clients
