"""Proof of address: a client that wants copies sent to another address shows that they arrive there.

A datagram with a nonce goes to the address, for each holder at most `MOST` in `PERIOD_SECONDS`. The client that sends
the nonce back is granted the `register` that it was for. So a client can't aim copies at a third host, which gets only
those few datagrams, and can't use up what another holder may ask for.
"""

import hmac
import secrets
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from services.gateway.admission.peer import Peer
from services.gateway.protocol.requests import Register, RequestError
from services.gateway.registry.entry import Entry, Origin
from shared.client import CHALLENGE_PREFIX, Client

PERIOD_SECONDS: Final = 60.0
MOST: Final = 3
"""Challenges to one address in a period, for one holder."""
MOST_IN_ALL: Final = 60
"""Challenges to all addresses in a period, for one holder; this also bounds the memory that they take."""
VALID_SECONDS: Final = 60.0

Send = Callable[[bytes, str, int], None]
"""Sends a datagram to an address and port; OSError when it can't be sent."""


@dataclass(slots=True)
class _Challenge:
    asked: Register
    peer: Peer
    nonce: str
    until: float


@dataclass(slots=True)
class AddressProofs:
    """The challenges that were sent and not answered; `clock` gives seconds."""

    send: Send
    clock: Callable[[], float]
    _open: OrderedDict[str, list[_Challenge]] = field(default_factory=OrderedDict)
    _sent: deque[tuple[float, str, str]] = field(default_factory=deque)
    """Time, holder and address of each challenge."""

    def challenge(self, asked: Register, address: str, peer: Peer) -> RequestError:
        """Send a challenge for a `register`, unless too many went to the address; return the refusal for its client."""
        port = asked.port
        if port is None:
            return RequestError(
                "bad_request", "port is missing: name the UDP port that the challenge for this address goes to"
            )
        self._forget()
        foreign = f"{address} is not the address of your connection"
        holder = peer.rights.holder
        sent = [to for _, by, to in self._sent if by == holder]
        if len(sent) >= MOST_IN_ALL or sent.count(address) >= MOST:
            return RequestError(
                "unproven_address", f"{foreign}, and the limit of challenges is reached; confirm one, or wait a minute"
            )
        challenge = _Challenge(asked, peer, secrets.token_urlsafe(24), self.clock() + VALID_SECONDS)
        try:
            self.send(CHALLENGE_PREFIX + challenge.nonce.encode(), address, port)
        except OSError as error:
            return RequestError("unproven_address", f"{foreign}, and no challenge can be sent there: {error.strerror}")
        self._sent.append((self.clock(), holder, address))
        self._open.setdefault(asked.name, []).append(challenge)
        return RequestError(
            "unproven_address",
            f"{foreign}: a datagram `fanwire-challenge NONCE` went to {address} port {port}; "
            f"send op confirm with name and nonce within {VALID_SECONDS:g} s",
        )

    def redeem(self, name: str, nonce: str, peer: Peer) -> Register:
        """Return the `register` that this nonce was for, once, to the client that asked for it."""
        self._forget()
        for challenge in self._open.get(name, []):
            if hmac.compare_digest(challenge.nonce.encode(), nonce.encode()) and peer.is_client_of(challenge.peer):
                self._open[name].remove(challenge)
                return challenge.asked
        raise RequestError(
            "unproven_address", f"no open challenge for {name!r} has this nonce; register again for a new one"
        )

    def _forget(self) -> None:
        now = self.clock()
        while self._sent and self._sent[0][0] <= now - PERIOD_SECONDS:
            self._sent.popleft()
        for name in list(self._open):
            kept = [challenge for challenge in self._open[name] if challenge.until > now]
            if kept:
                self._open[name] = kept
            else:
                del self._open[name]


def proven_before(present: Entry | None, client: Client, peer: Peer) -> bool:
    """Return whether the entry that `client` replaces was proven: the same place, client and host."""
    return (
        present is not None
        and present.proven
        and present.origin is Origin.JSON
        and peer.is_client_of(present.peer)
        and peer.address == present.peer.address
        and present.client.socket_address == client.socket_address
    )
