"""Who may do what: the rights of a connection, and which of them a request takes. No I/O.

Who comes by a listener on loopback or AF_UNIX is on this host and has every right. Who comes from elsewhere has none,
but those of the `[[token]]` that its token or its certificate belongs to: its holder.
"""

import hashlib
import hmac
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network
from typing import Any, Final

from services.gateway.protocol.requests import (
    Auth,
    Confirm,
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
)
from shared.client import ALL_STREAMS
from shared.settings.model import SCOPES, Scope, Token

TAKES: Final[dict[type[Request], frozenset[Scope]]] = {
    Auth: frozenset(),
    ListClients: frozenset({"list"}),
    WatchClients: frozenset({"list"}),
    ListStreams: frozenset({"list"}),
    Register: frozenset({"collect"}),
    Renew: frozenset({"collect"}),
    Leave: frozenset({"collect"}),
    Confirm: frozenset({"collect"}),
    Transmit: frozenset({"transmit"}),
    SignUp: frozenset({"collect", "list"}),
}
"""The scopes that each request takes. A name signs up and shows the list."""


@dataclass(frozen=True, slots=True)
class Rights:
    """What a connection may do; `holder` is the name of its token or certificate, "" without one.

    `destinations` are networks that it may have copies sent to without proof; `names`: it may use the names protocol.
    """

    holder: str = ""
    scopes: frozenset[Scope] = frozenset()
    streams: tuple[str, ...] = (ALL_STREAMS,)
    destinations: tuple[IPv4Network | IPv6Network, ...] = ()
    names: bool = False

    @property
    def everything(self) -> bool:
        """Whether it may also change what is not its own."""
        return "admin" in self.scopes

    def check(self, request: Request) -> None:
        """Raise `RequestError` unless it may make such a request."""
        if isinstance(request, SignUp) and not self.names:
            raise _refused(
                "names are taken on loopback; with [gateway] names_beyond_loopback from clients with a certificate too"
            )
        lacking = frozenset[Scope]() if self.everything else TAKES[type(request)] - self.scopes
        if lacking and not self.holder:
            raise _refused("who comes from elsewhere shows a client certificate, or sends op auth with its token first")
        if lacking:
            has, lacks = (", ".join(sorted(scopes)) for scopes in (self.scopes, lacking))
            raise _refused(f"this takes the scope {lacks}, and {self.holder!r} has {has}")

    def check_streams(self, wanted: Iterable[str]) -> None:
        """Raise `RequestError` unless it may receive all of these streams."""
        if ALL_STREAMS not in self.streams and not set(wanted) <= set(self.streams):
            raise _refused(f"{self.holder!r} may sign up for these streams only: {', '.join(self.streams)}")

    def may_send_to(self, address: IPv4Address | IPv6Address) -> bool:
        """Whether it may have copies sent to this address without proof."""
        return any(address in network for network in self.destinations)


HERE: Final = Rights(scopes=frozenset(SCOPES), names=True)
"""Of who is on this host."""
NOBODY: Final = Rights()
"""Of who comes from elsewhere and has not said who it is."""


class Tokens:
    """The rights that tokens and certificates give."""

    def __init__(self, tokens: Iterable[Token], *, names_beyond_loopback: bool = False) -> None:
        self._by_hash: list[tuple[bytes, Rights]] = []
        self._by_certificate: dict[str, Rights] = {}
        for token in tokens:
            if token.hash is not None:
                self._by_hash.append((bytes.fromhex(token.hash.partition(":")[2]), _rights(token)))
            elif token.certificate is not None:
                self._by_certificate[token.certificate] = _rights(token, names=names_beyond_loopback)

    def of_token(self, token: str) -> Rights:
        """The rights of who knows this token; `RequestError`, whatever is wrong with it.

        The work depends on the number of tokens alone: every one is compared, each in constant time.
        """
        # No salt and no slow hash: a token is 256 random bits, which nobody finds by trying, however fast that is.
        digest = hashlib.sha256(token.encode()).digest()
        matching = [hmac.compare_digest(digest, known) for known, _ in self._by_hash]
        if True not in matching:
            raise _refused("this token is none of ours; the operator makes one with `fanwire token`")
        return self._by_hash[matching.index(True)][1]

    def of_certificate(self, common_name: str | None) -> Rights:
        """The rights of who has shown a certificate with this subject, which one of our authorities has signed."""
        return NOBODY if common_name is None else self._by_certificate.get(common_name, NOBODY)


def common_name(certificate: Mapping[str, Any] | None) -> str | None:
    """The subject's common name in what `getpeercert()` returned; None: no certificate, or not exactly one name.

    >>> common_name({"subject": ((("organizationName", "Lab"),), (("commonName", "siem"),))})
    'siem'
    """
    subject = certificate.get("subject", ()) if certificate else ()
    names = [value for parts in subject for key, value in parts if key == "commonName"]
    return names[0] if len(names) == 1 else None


def _rights(token: Token, *, names: bool = False) -> Rights:
    destinations = tuple(map(ip_network, token.destinations))
    return Rights(token.name, frozenset(token.scopes), token.streams, destinations, names)


def _refused(message: str) -> RequestError:
    return RequestError("not_permitted", message)
