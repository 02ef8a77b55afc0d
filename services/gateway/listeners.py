"""The listening sockets for clients, and what this host says of its own addresses."""

import contextlib
import errno
import os
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from shared.addresses import Endpoint, resolve
from shared.lifecycle import FAILED, OperatorError
from shared.settings import Settings

BACKLOG: Final = 1024
SEND_BUFFER: Final = 128 * 1024
"""Bytes asked of the kernel for each connection (it takes twice that): bounds what a client that does not read holds
there, and lets us see progress of one that reads slowly."""
KEEPALIVE: Final = ((socket.TCP_KEEPIDLE, 30), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3))
"""A peer that has vanished is noticed after a minute."""


@contextlib.contextmanager
def listening(endpoints: Iterable[Endpoint]) -> Iterator[list[socket.socket]]:
    """Yield sockets bound to every address of every endpoint; close them and remove their files in the end."""
    with contextlib.ExitStack() as stack:
        sockets: list[socket.socket] = []
        for endpoint in endpoints:
            try:
                opened = [_bind_path(endpoint.path)] if endpoint.path else _bind_addresses(endpoint)
            except OSError as error:
                raise OperatorError(FAILED, f"{endpoint}: {_cure(error)}") from None
            for listener in opened:
                stack.callback(listener.close)
            if endpoint.path:
                stack.callback(_remove, Path(endpoint.path), Path(endpoint.path).stat().st_ino)
            sockets += opened
        yield sockets


def _cure(error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return "in use; see by whom with `ss -ltnp` (`ss -lxp` for a path), or set another [gateway] listen"
    return f"{error.strerror}; set another [gateway] listen"


def _bind_addresses(endpoint: Endpoint) -> list[socket.socket]:
    """Bind every address of a host name. A family that this host lacks is passed over if another is there."""
    bound: list[socket.socket] = []
    lacking: OSError | None = None
    for family, address in resolve(endpoint.host, endpoint.port, socket.SOCK_STREAM):
        try:
            bound.append(_bind(family, address))
        except OSError as error:
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                for listener in bound:
                    listener.close()
                raise
            lacking = error
    if lacking is not None and not bound:
        raise lacking
    return bound


def _bind(family: socket.AddressFamily, address: object) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        # Accepted connections inherit these. SO_REUSEADDR: a restart does not wait for TIME_WAIT to pass.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        for option, value in KEEPALIVE:
            listener.setsockopt(socket.IPPROTO_TCP, option, value)
        if family == socket.AF_INET6:
            # [::] serves IPv4 too; ::1 must not, or 127.0.0.1 of the same name could not be bound (ipv6(7)).
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, address[0] != "::")  # type: ignore[index]
        listener.bind(address)  # type: ignore[arg-type]
    except OSError:
        listener.close()
        raise
    return listener


def _bind_path(path: str) -> socket.socket:
    """Bind an AF_UNIX path for our user alone. A file left by a process that is gone is removed, a live one is not."""
    if Path(path).is_socket():
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe, contextlib.suppress(ConnectionRefusedError):
            probe.connect(path)
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
        Path(path).unlink()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        listener.bind(path)
    except OSError:
        listener.close()
        raise
    finally:
        os.umask(before)
    return listener


def _remove(path: Path, inode: int) -> None:
    """Remove the file of an AF_UNIX listener, unless it is a successor's by now."""
    with contextlib.suppress(OSError):
        if path.stat().st_ino == inode:
            path.unlink()


def udp_listeners(settings: Settings) -> list[tuple[str, int]]:
    """Address and port of every UDP listener of every stream; a host name that is not known has none."""
    found: list[tuple[str, int]] = []
    for endpoint in (endpoint for stream in settings.streams for endpoint in stream.endpoints):
        if endpoint.scheme == "udp":
            with contextlib.suppress(OSError):
                found += [
                    (str(at[0]), endpoint.port) for _, at in resolve(endpoint.host, endpoint.port, socket.SOCK_DGRAM)
                ]
    return found


def is_local(address: str) -> bool:
    """Whether `address` is one of this host's: the kernel lets us bind it."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True
