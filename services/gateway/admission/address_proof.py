"""Proof of address: who wants copies sent elsewhere than to itself shows that what is sent there reaches it.

A datagram with a nonce goes to the address, at most `MOST` in `PERIOD_SECONDS`; whoever brings the nonce back has the
register granted that it was for. So nobody can aim copies at a third, who gets those few datagrams and nothing else.
"""

import hmac
import secrets
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from services.gateway.protocol.requests import Register, RequestError
from shared.client import CHALLENGE_PREFIX

PERIOD_SECONDS: Final = 60.0
MOST: Final = 3
"""AddressProofs to one address in a period."""
MOST_IN_ALL: Final = 600
"""AddressProofs to all addresses in a period, which bounds what is remembered too."""
VALID_SECONDS: Final = 60.0

Send = Callable[[bytes, str, int], None]
"""Sends a datagram to an address and port; OSError when it can't be sent."""


@dataclass(slots=True)
class _Challenge:
    wish: Register
    nonce: str
    until: float


@dataclass(slots=True)
class AddressProofs:
    """The challenges that are out; `clock` gives seconds."""

    send: Send
    clock: Callable[[], float]
    _open: OrderedDict[str, list[_Challenge]] = field(default_factory=OrderedDict)
    _sent: deque[tuple[float, str]] = field(default_factory=deque)

    def challenge(self, wish: Register, address: str) -> RequestError:
        """Send a challenge for a `register`, unless too many went there; return what its client is told."""
        port = wish.port
        if port is None:
            return RequestError("bad_request", "port is missing: a proof of address goes to an address and port")
        self._forget()
        away = f"{address} is not where you come from"
        if len(self._sent) >= MOST_IN_ALL or sum(to == address for _, to in self._sent) >= MOST:
            return RequestError(
                "unproven_address", f"{away}, and no more challenges go there for now; confirm one, or wait a minute"
            )
        challenge = _Challenge(wish, secrets.token_urlsafe(24), self.clock() + VALID_SECONDS)
        try:
            self.send(CHALLENGE_PREFIX + challenge.nonce.encode(), address, port)
        except OSError as error:
            return RequestError("unproven_address", f"{away}, and it can't be asked: {error.strerror}")
        self._sent.append((self.clock(), address))
        self._open.setdefault(wish.name, []).append(challenge)
        return RequestError(
            "unproven_address",
            f"{away}: a datagram `fanwire-challenge NONCE` went to {address} port {port}; "
            f"send op confirm with name and nonce within {VALID_SECONDS:g} s",
        )

    def confirm(self, name: str, nonce: str) -> Register:
        """Return the `register` that this nonce was for, once."""
        self._forget()
        for challenge in self._open.get(name, []):
            if hmac.compare_digest(challenge.nonce.encode(), nonce.encode()):
                self._open[name].remove(challenge)
                return challenge.wish
        raise RequestError("unproven_address", f"no such challenge is open for {name!r}; register again for another")

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
