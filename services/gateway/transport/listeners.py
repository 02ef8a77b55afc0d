"""Listening sockets for clients, and questions to the kernel: is an address this host's, is it broadcast."""

import contextlib
import ipaddress
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from shared.net.addresses import Endpoint
from shared.net.port_holders import explain_bind
from shared.net.sockets import Bind, bind_endpoint, close_listener, prepare_listener
from shared.process.lifecycle import FAILED, OperatorError

BACKLOG: Final = 1024
SEND_BUFFER: Final = 128 * 1024
"""Bytes asked of the kernel for each connection (it takes twice that): bounds the memory that a client that does not
read holds there, and shows the progress of one that reads slowly."""
DISCARD_PORT: Final = 9
"""Port for sockets that ask the kernel about an address: nothing is sent."""


@dataclass(frozen=True, slots=True)
class Listener:
    """A bound socket, and the endpoint of which it is one address."""

    endpoint: Endpoint
    sock: socket.socket

    @property
    def secure(self) -> bool:
        """Return whether its connections are TLS."""
        return self.endpoint.scheme == "tls"

    @property
    def remote(self) -> bool:
        """Return whether clients on other hosts can connect to it."""
        if self.sock.family == socket.AF_UNIX:
            return False
        return not ipaddress.ip_address(self.sock.getsockname()[0].partition("%")[0]).is_loopback


@contextlib.contextmanager
def listening(endpoints: Iterable[Endpoint], bind: Bind = bind_endpoint) -> Iterator[list[Listener]]:
    """Yield listeners bound to every address of every endpoint; close them and remove their files in the end."""
    with contextlib.ExitStack() as stack:
        listeners: list[Listener] = []
        for endpoint in endpoints:
            try:
                opened = bind(endpoint, _prepare, path_mode=0o600)
                for sock in opened:
                    stack.callback(close_listener, sock)
                    sock.listen(BACKLOG)  # before the next is bound: by SO_REUSEADDR two can bind one port, not listen
            except OSError as error:
                raise OperatorError(
                    FAILED, f"{endpoint}: {explain_bind(error, endpoint, '[gateway] listen')}"
                ) from None
            listeners += (Listener(endpoint, sock) for sock in opened)
        yield listeners


def _prepare(listener: socket.socket) -> None:
    """Bound the send buffer of accepted connections, besides what every listener has."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
    prepare_listener(listener)


def is_broadcast(address: str) -> bool:
    """Return whether `address` reaches every host of a network of this host: the kernel wants SO_BROADCAST for it."""
    if ":" in address:
        return False
    with _probe(socket.AF_INET) as probe:
        try:
            probe.connect((address, DISCARD_PORT))
        except PermissionError:
            return True
        except OSError:  # no route now
            return False
    return False


def send_datagram(payload: bytes, address: str, port: int) -> None:
    """Send one datagram without waiting; OSError when that is not possible."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.setblocking(False)
        sender.sendto(payload, (address, port))


def is_local(address: str) -> bool:
    """Return whether `address` is this host's. Binding it does not tell, with net.ipv4.ip_nonlocal_bind set."""
    with _probe(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        try:
            if probe.family == socket.AF_INET:  # the kernel accepts only an address of one of its interfaces
                probe.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(address))
                return True
            probe.connect((address, DISCARD_PORT))
        except OSError:
            return False
        own = ipaddress.ip_address(probe.getsockname()[0].partition("%")[0])
        return own == ipaddress.ip_address(address)  # a host speaks to itself from the same address (RFC 6724, 5)


def _probe(family: socket.AddressFamily) -> socket.socket:
    try:
        return socket.socket(family, socket.SOCK_DGRAM)
    except OSError as error:  # for example, no descriptor to spare
        raise OSError(error.errno, f"the address can't be checked just now: {error.strerror}") from None
