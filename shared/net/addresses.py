"""Addresses as the bus carries them (16 bytes, IPv4 mapped into IPv6) and as people write them."""

import contextlib
import ipaddress
import re
import socket
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final, cast

from shared.net.running_lookups import begin_lookup, wait_for_lookup

V4_MAPPED: Final = bytes(10) + b"\xff\xff"
"""The first 12 bytes of an IPv4 address mapped into IPv6 (RFC 4291, 2.5.5.2)."""

PATIENCE_SECONDS: Final = 10.0
"""Time that a start or a command waits for the resolver, which may take a minute to give up."""
MAX_NAME: Final = 253
_LABEL: Final = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")
"""An underscore is in no host name, but in many zones of sites."""
_NUMBER: Final = re.compile(r"[0-9]+|0[xX][0-9A-Fa-f]*")
"""A number, which inet_aton(3) reads as a part of an address."""

LOCAL_SENDER: Final = V4_MAPPED + bytes((127, 0, 0, 1))
"""Stands for a sender on an AF_UNIX socket, which has no address of its own; its port is 0."""


def pack_address(text: str) -> bytes:
    """Return the 16 bytes of an address; IPv4 is mapped. ValueError when `text` is not an address.

    >>> pack_address("192.0.2.1").hex()
    '00000000000000000000ffffc0000201'
    """
    address = ipaddress.ip_address(text)
    if isinstance(address, ipaddress.IPv6Address) and address.scope_id:
        raise ValueError(f"{text!r} has a scope (%); expected an address without one")
    return V4_MAPPED + address.packed if address.version == 4 else address.packed


def unpack_address(packed: bytes) -> str:
    """Return the text of 16 packed bytes; mapped addresses come back as IPv4.

    >>> unpack_address(pack_address("192.0.2.1")), unpack_address(pack_address("2001:db8::1"))
    ('192.0.2.1', '2001:db8::1')
    """
    if packed.startswith(V4_MAPPED):
        return socket.inet_ntop(socket.AF_INET, packed[12:])
    return socket.inet_ntop(socket.AF_INET6, packed)


def is_host_name(text: str) -> bool:
    """Return whether `text` can be a host's name (RFC 1123, 2.1), and is nothing that resolvers take for an address.

    >>> [is_host_name(text) for text in ("siem.example.net", "siem", "192.0.2.300", "0x7f000001", "a b")]
    [True, True, False, False, False]
    """
    *_, last = labels = text.removesuffix(".").split(".")
    return len(text) <= MAX_NAME and all(map(_LABEL.fullmatch, labels)) and not _NUMBER.fullmatch(last)


def is_name(host: str) -> bool:
    """Return whether a resolver is asked for a listener's host: it is no address, with or without an interface.

    >>> [is_name(host) for host in ("relay.example.net", "192.0.2.1", "239.1.1.1%eth0")]
    [True, False, False]
    """
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(host.partition("%")[0])
        return False
    return True


def check_host(text: str) -> None:
    """Raise ValueError unless `text` is an address or can be a host's name."""
    if not is_host_name(text):
        try:
            pack_address(text)
        except ValueError as error:
            if "scope" in str(error):
                raise
            has_port = text.rpartition(":")[2].isdigit() and "." in text
            hint = "; the port has a key of its own" if has_port else ""
            raise ValueError(f"{text!r} is neither an IP address nor a host name{hint}") from None


def pack_network(text: str) -> tuple[bytes, int]:
    """Return a prefix as 16 packed bytes and its length in bits out of 128. ValueError when it is not one.

    >>> pack_network("192.0.2.0/24")[1], pack_network("2001:db8::/32")[1]
    (120, 32)
    """
    return _pack_plainly(text) or _pack_network(text)


def _pack_plainly(text: str) -> tuple[bytes, int] | None:
    """Return a prefix in the form that most have, a tenth of the time below; None: it has another, or is none."""
    address, slash, length = text.partition("/")
    try:
        packed = socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)
    except (OSError, UnicodeEncodeError, ValueError):
        return None
    size = 8 * len(packed)
    bits = size if not slash else int(length) if length.isascii() and length.isdigit() and len(length) < 4 else -1
    if not 0 <= bits <= size or int.from_bytes(packed) & (1 << size - bits) - 1:
        return None
    return (V4_MAPPED + packed, bits + 96) if size == 32 else (packed, bits)


def _pack_network(text: str) -> tuple[bytes, int]:
    try:
        network = ipaddress.ip_network(text)
    except ValueError as error:
        cure = f"; expected {ipaddress.ip_network(text, strict=False)}"  # else this raises the same error
        raise ValueError(f"{error}{cure}") from None
    packed = network.network_address.packed
    return (V4_MAPPED + packed, network.prefixlen + 96) if network.version == 4 else (packed, network.prefixlen)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """The place at which a service listens: a scheme with a host and port, or a scheme with a path."""

    scheme: str
    host: str = ""
    port: int = 0
    path: str = ""
    known: tuple[str, ...] = field(default=(), compare=False, repr=False)
    """Addresses of the host, where it was looked up already."""

    def addresses(self, kind: socket.SocketKind) -> "list[tuple[socket.AddressFamily, SocketAddress]]":
        """Return every address of its host and port, as `resolve` does."""
        return [at for host in self.known or (self.host,) for at in resolve(host, self.port, kind)]

    @property
    def is_loopback(self) -> bool:
        """Return whether nobody on another host can get there; a name other than `localhost` may lead anywhere."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def __str__(self) -> str:
        if self.path:
            return f"{self.scheme}://{self.path}"
        return f"{self.scheme}://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"


def parse_endpoint(text: str, schemes: tuple[str, ...]) -> Endpoint:
    """Read an endpoint such as `udp://localhost:6667` or `unix:///run/x.sock`; `str()` is the way back.

    ValueError says what was expected. `schemes` are those the caller serves; those beginning with `unix` take a path.

    A multicast address may name its interface: `udp://239.1.1.1%eth0:5514`; a link-local IPv6 address has to.

    >>> parse_endpoint("udp://[::]:514", ("udp",))
    Endpoint(scheme='udp', host='::', port=514, path='')
    """
    scheme, separator, rest = text.partition("://")
    if not separator or scheme not in schemes:
        raise ValueError(f"{text!r} does not begin with {' or '.join(f'{name}://' for name in schemes)}")
    if scheme.startswith("unix"):
        if not rest.startswith("/") or len(rest.encode()) > 107:  # sizeof sun_path, unix(7)
            raise ValueError(f"{text!r}: expected an absolute path of at most 107 bytes after {scheme}://")
        return Endpoint(scheme, path=rest)
    host, separator, port = rest.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError(f"{text!r}: an IPv6 address goes in brackets, as in {scheme}://[::1]:{port}")
    _check_use(text, scheme, host)
    in_range = port.isascii() and port.isdigit() and len(port) <= 5 and 0 < int(port) < 65536
    if not separator or not host or not in_range:
        raise ValueError(f"{text!r}: expected {scheme}://HOST:PORT with a port from 1 to 65535")
    return Endpoint(scheme, host, int(port))


def _check_use(text: str, scheme: str, host: str) -> None:
    """Raise ValueError when this scheme can't listen on an address, or the address lacks its interface."""
    address, percent, _ = host.partition("%")
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        if percent:
            raise ValueError(f"{text!r}: an interface (%) goes with an address, not with a name") from None
        return
    if scheme != "udp" and (ip.is_multicast or address == "255.255.255.255"):
        raise ValueError(f"{text!r}: datagrams to {address} come by UDP only; listen on udp://")
    if _has_link_scope(ip) and not percent:
        example = text.replace(address, f"{address}%eth0")
        raise ValueError(f"{text!r}: the address belongs to one link; add the interface, as in {example}")
    if percent and not (ip.is_multicast or _has_link_scope(ip)):
        raise ValueError(f"{text!r}: an interface (%) goes with a multicast or link-local address alone")


def _has_link_scope(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Return whether an address has a meaning only together with an interface (RFC 4007)."""
    return address.version == 6 and (address.is_link_local or (address.is_multicast and address.packed[1] & 0xF == 2))


SocketAddress = tuple[str, int] | tuple[str, int, int, int]
"""An address for bind(2) of an IP socket: host and port, for IPv6 with flow label and scope."""


def resolve(
    host: str, port: int, kind: socket.SocketKind, patience_seconds: float | None = PATIENCE_SECONDS
) -> list[tuple[socket.AddressFamily, SocketAddress]]:
    """Return every address of `host`, IPv4 and IPv6, each once. OSError when the name is not known, or not in time.

    An interface behind `%` is part of the address where it has link scope; otherwise it only says where a group is
    joined.
    """
    address, percent, _ = host.partition("%")
    try:
        if percent and not _has_link_scope(ipaddress.ip_address(address)):
            host = address
        if patience_seconds is not None and _is_waited_for(host):
            found = wait_for_lookup(host, patience_seconds)
        else:
            found = socket.getaddrinfo(host, port, type=kind, flags=socket.AI_PASSIVE)
    except (UnicodeError, ValueError):  # an empty label, or one too long to look up
        raise socket.gaierror(socket.EAI_NONAME, "not a host name") from None
    places = ((family, (at[0], port, *at[2:])) for family, _, _, _, at in found)
    return list(dict.fromkeys((family, cast(SocketAddress, at)) for family, at in places))


def begin_lookups(hosts: Iterable[str]) -> None:
    """Let names among these hosts be looked up side by side: those that `resolve` soon after have one bound."""
    for host in hosts:
        if _is_waited_for(host):
            with contextlib.suppress(OSError):
                begin_lookup(host)


def _is_waited_for(host: str) -> bool:
    return is_name(host) and host not in ("", "localhost")


def are_apart(some: Iterable[str], others: Iterable[str]) -> bool:
    """Return whether no address is in a network of both.

    >>> are_apart(["10.0.0.0/8"], ["10.1.0.0/16"]), are_apart(["10.0.0.0/8"], ["192.0.2.0/24", "::/0"])
    (False, True)
    """
    spans = sorted([(*_span(text), 0) for text in some] + [(*_span(text), 1) for text in others])
    reach = [-1, -1]
    for first, last, side in spans:
        if first <= reach[1 - side]:
            return False
        reach[side] = max(reach[side], last)
    return True


def is_inside(address: str, networks: Iterable[str]) -> bool:
    """Return whether an address is in one of these networks.

    >>> is_inside("10.1.0.1", ["192.0.2.0/24", "10.0.0.0/8"]), is_inside("10.1.0.1", ["::/0"])
    (True, False)
    """
    at, _ = _span(address)
    return any(first <= at <= last for first, last in map(_span, networks))


@lru_cache(maxsize=8192)  # entries are compared with many others
def _span(text: str) -> tuple[int, int]:
    network, bits = pack_network(text)
    ipv4 = network.startswith(V4_MAPPED) and bits >= 96  # which are in no network of IPv6, not even ::/0
    first = int.from_bytes(network) + (ipv4 << 128)
    return first, first | (1 << (128 - bits)) - 1
