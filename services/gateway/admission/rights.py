"""The rights of a connection, and the scopes that each request needs. No I/O.

A connection from this host, by loopback or AF_UNIX, has every right. One from elsewhere has the rights of the
`[[token]]` that its token or certificate belongs to, its holder; without one it may only send `auth`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Final

from services.gateway.protocol.requests import (
    Auth,
    Confirm,
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
from shared.client import ALL_STREAMS
from shared.settings.values import SCOPES, Scope

SCOPES_NEEDED: Final[dict[type[Request], frozenset[Scope]]] = {
    Auth: frozenset(),
    ListClients: frozenset({"list"}),
    WatchClients: frozenset({"list"}),
    ListStreams: frozenset({"list"}),
    Register: frozenset({"collect"}),
    Renew: frozenset({"collect"}),
    Leave: frozenset({"collect"}),
    Confirm: frozenset({"collect"}),
    Withhold: frozenset({"admin"}),
    Release: frozenset({"admin"}),
    Transmit: frozenset({"transmit"}),
    SignUp: frozenset({"collect", "list"}),
}
"""A client of the names protocol signs up and gets the list, so it needs two."""


@dataclass(frozen=True, slots=True)
class Rights:
    """The rights of a connection; `holder` is the name of its token or certificate, "" without one.

    `destinations` are networks that copies may be sent to without proof; `names` allows the names protocol.
    """

    holder: str = ""
    scopes: frozenset[Scope] = frozenset()
    streams: tuple[str, ...] = (ALL_STREAMS,)
    destinations: tuple[IPv4Network | IPv6Network, ...] = ()
    names: bool = False

    @property
    def everything(self) -> bool:
        """Return whether entries of others may be changed too."""
        return "admin" in self.scopes

    def check(self, request: Request) -> None:
        """Raise `RequestError` unless these rights allow such a request."""
        if isinstance(request, SignUp) and not self.names:
            raise _refused(
                "the names protocol is for loopback only; [gateway] names_beyond_loopback allows it to clients with a "
                "certificate too"
            )
        lacking = frozenset[Scope]() if self.everything else SCOPES_NEEDED[type(request)] - self.scopes
        if lacking and not self.holder:
            raise _refused(
                "a client from another host must first send op auth with its token (`--token-file` of the commands), "
                "or show a certificate"
            )
        if lacking:
            has, lacks = (", ".join(sorted(scopes)) for scopes in (self.scopes, lacking))
            raise _refused(f"this request needs scope {lacks}, and {self.holder!r} has {has}; add it to its [[token]]")

    def check_streams(self, wanted: Iterable[str]) -> None:
        """Raise `RequestError` unless these rights allow all of these streams."""
        if ALL_STREAMS not in self.streams and not set(wanted) <= set(self.streams):
            raise _refused(f"{self.holder!r} may sign up for these streams only: {', '.join(self.streams)}")

    def may_send_to(self, address: IPv4Address | IPv6Address) -> bool:
        """Return whether copies may be sent to this address without proof."""
        return any(address in network for network in self.destinations)


HERE: Final = Rights(scopes=frozenset(SCOPES), names=True)
"""A connection from this host."""
NOBODY: Final = Rights()
"""A connection from elsewhere that has shown no token and no certificate."""


def _refused(message: str) -> RequestError:
    return RequestError("not_permitted", message)
