"""Destinations of copies: streams that exist, an address of one host, no loop, proof where it is due. No I/O."""

import ipaddress
from collections.abc import Callable, Iterable

from services.gateway.admission.peer import Peer
from services.gateway.protocol.requests import Register, RequestError
from shared.client import ALL_STREAMS, Client
from shared.settings.entries import Collector
from shared.settings.own_listeners import OwnListeners

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
NOBODYS_V4 = (ipaddress.IPv4Network("0.0.0.0/8"), ipaddress.IPv4Network("240.0.0.0/4"))
"""This network, and reserved with limited broadcast (RFC 6890)."""


class Destinations:
    """Rules for the streams and the destination of a client.

    `listeners` are fanwire's own. `is_local` says whether an address is this host's, `is_broadcast` whether it is that
    of a whole network; both may raise OSError. Copies may go to networks of `allowed` without proof.
    """

    def __init__(
        self,
        streams: Iterable[str],
        listeners: OwnListeners,
        is_local: Callable[[str], bool],
        is_broadcast: Callable[[str], bool],
        allowed: Iterable[str] = (),
    ) -> None:
        self._streams = frozenset(streams)
        self._own_listeners = listeners
        self._is_local = is_local
        self._is_broadcast = is_broadcast
        self._allowed = tuple(map(ipaddress.ip_network, allowed))

    def resolve(self, request: Register, peer: Peer) -> Client:
        """Return the entry for a request, with the destination of its copies; `RequestError` when it is not allowed.

        The registry sets the generation.
        """
        self._check_streams(request.streams)
        peer.rights.check_streams(request.streams)
        if request.streams and request.port is None:
            raise RequestError("bad_request", "port is missing: expected the UDP port that the copies go to")
        address = parse_address(peer.address if request.address is None else request.address)
        port = peer.port if request.port is None else request.port
        if request.address is not None or request.streams:
            self._check_destination(address)
        if request.streams:
            self._check_loop(address, port)
        terms = request.terms
        terms["streams"] = tuple(dict.fromkeys(request.streams))
        terms["prefixes"] = tuple(_parse_prefix(prefix) for prefix in request.prefixes)
        return Client(**terms, generation=0, address=str(address), port=port)

    def resolve_configured(self, collector: Collector) -> Client:
        """Return the entry for a collector of the settings; its operator needs no proof."""
        address = parse_address(collector.address)
        self._check_destination(address)
        self._check_loop(address, collector.port)
        terms, catch_up = collector.terms, collector.catch_up
        return Client(**terms, generation=0, address=str(address), port=collector.port, catch_up=catch_up)

    def need_proof(self, request: Register, peer: Peer) -> bool:
        """Return whether the peer has to prove first that copies arrive at its destination."""
        return request.address is not None and self.needs_proof(parse_address(request.address), peer)

    def needs_proof(self, address: Address, peer: Peer) -> bool:
        """Return whether copies for this peer go to the address only after proof."""
        own = parse_address(peer.address)
        if address == own or (address.is_loopback and own.is_loopback):
            return False
        return not (peer.rights.may_send_to(address) or any(address in network for network in self._allowed))

    def find_loop(self, client: Client) -> bool:
        """Return whether the copies of an entry would come back: a listener or an address of this host may be new."""
        return bool(client.streams) and self._own_listeners.receive(client.address, client.port, self._is_local)

    def _check_streams(self, streams: Iterable[str]) -> None:
        for stream in streams:
            if stream != ALL_STREAMS and stream not in self._streams:
                known = ", ".join(sorted(self._streams))
                raise RequestError("unknown_stream", f"there is no stream {stream[:64]!r}; there are: {known}")

    def _check_destination(self, address: Address) -> None:
        nobodys = address.version == 4 and any(address in network for network in NOBODYS_V4)
        if nobodys or address.is_unspecified or address.is_multicast or address.is_link_local:
            raise RequestError(
                "bad_request",
                f"address: {address} is not the address of one host; expected a unicast address, and no link-local one",
            )
        if self._is_broadcast(str(address)):
            raise RequestError(
                "bad_request", f"address: {address} is a broadcast address; expected the address of one host"
            )

    def _check_loop(self, address: Address, port: int) -> None:
        if self._own_listeners.receive(str(address), port, self._is_local):
            raise RequestError(
                "loop", f"{address} port {port} is one of fanwire's own listeners; receive on another port"
            )


def parse_address(text: str) -> Address:
    """Return the address, IPv4 where it is mapped into IPv6; `bad_request` when it is none."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        raise RequestError("bad_request", "address: expected an IP address, not a name") from None
    if isinstance(address, ipaddress.IPv6Address):
        if address.scope_id:
            raise RequestError("bad_request", "address: expected one without a scope (%)")
        return address.ipv4_mapped or address
    return address


def _parse_prefix(text: str) -> str:
    try:
        return str(ipaddress.ip_network(text))
    except ValueError as error:
        raise RequestError("bad_request", f"from: {error}; expected a prefix such as 192.0.2.0/24") from None
