"""Opens the sockets of a stream's listeners; what can't be had ends the start with one line that says the cure."""

import errno
import ipaddress
import socket
import stat
from pathlib import Path
from typing import Final

import structlog

from shared.addresses import Endpoint, SocketAddress, resolve
from shared.lifecycle import BAD_SETTINGS, FAILED, OperatorError
from shared.settings import Stream

SO_RCVBUFFORCE: Final = 33
TCP_BACKLOG: Final = 1024
NOT_HERE: Final = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
"""What a host without IPv6 says to one of several addresses of a name; the others serve."""

log = structlog.get_logger()


def open_sockets(stream: Stream, endpoint: Endpoint) -> list[socket.socket]:
    """Bind every address of an endpoint, non-blocking; OperatorError when none can be had or one is in use."""
    if endpoint.path:
        return [_open_path(stream, endpoint)]
    kind = socket.SOCK_STREAM if endpoint.scheme == "tcp" else socket.SOCK_DGRAM
    try:
        addresses = resolve(endpoint.host, endpoint.port, kind)
    except OSError as error:
        raise OperatorError(BAD_SETTINGS, f"stream {stream.name}: {endpoint}: {error.strerror}") from None
    if stream.reply and endpoint.scheme == "udp" and not stream.reply_beyond_loopback:
        _refuse_reply(stream, endpoint, addresses)
    sockets: list[socket.socket] = []
    absent = ""
    for family, address in addresses:
        try:
            sockets.append(_open(family, kind, address))
        except OSError as error:
            if error.errno not in NOT_HERE:
                raise _explained(stream, endpoint, error) from None
            absent = error.strerror or ""
    if not sockets:
        raise OperatorError(FAILED, f"stream {stream.name}: {endpoint}: {absent}")
    return sockets


def _refuse_reply(
    stream: Stream, endpoint: Endpoint, addresses: list[tuple[socket.AddressFamily, SocketAddress]]
) -> None:
    if not all(ipaddress.ip_address(address[0].partition("%")[0]).is_loopback for _, address in addresses):
        raise OperatorError(
            BAD_SETTINGS,
            f"stream {stream.name}: a reply on {endpoint} would let forged sources aim it at others; "
            "remove reply, listen on loopback, or set reply_beyond_loopback = true",
        )


def _open(family: socket.AddressFamily, kind: socket.SocketKind, address: SocketAddress) -> socket.socket:
    sock = socket.socket(family, kind)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            # [::] is dual-stack; any other address is IPv6 alone anyway.
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(address[0] != "::"))
        if kind == socket.SOCK_STREAM:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        if kind == socket.SOCK_STREAM:
            sock.listen(TCP_BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock


def _open_path(stream: Stream, endpoint: Endpoint) -> socket.socket:
    path = Path(endpoint.path)
    if path.exists() and stat.S_ISSOCK(path.lstat().st_mode) and _is_stale(path):
        path.unlink()
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        sock.setblocking(False)
        sock.bind(endpoint.path)
    except OSError as error:
        sock.close()
        raise _explained(stream, endpoint, error) from None
    return sock


def _is_stale(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
        return False


def _explained(stream: Stream, endpoint: Endpoint, error: OSError) -> OperatorError:
    cure = ""
    if error.errno == errno.EADDRINUSE:
        tool = "ss -xlp" if endpoint.path else f"ss -{endpoint.scheme[0]}lnp"
        cure = f"; see what holds it with `{tool}`, stop that or listen elsewhere"
    elif error.errno in (errno.EACCES, errno.EPERM):
        cure = "; ports below 1024 need `sysctl net.ipv4.ip_unprivileged_port_start` lowered or CAP_NET_BIND_SERVICE"
        cure = "; choose a path this user may write to" if endpoint.path else cure
    return OperatorError(FAILED, f"stream {stream.name}: {endpoint}: {error.strerror}{cure}")


def enlarge_receive_buffer(sock: socket.socket, wanted: int) -> int:
    """Ask for a receive buffer, by force where allowed; return the bytes granted."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, wanted)
    except PermissionError:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, wanted)
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) // 2  # the kernel doubles it for its own records


def warn_of_small_buffers(granted: dict[int, int]) -> None:
    """Say once which receive buffers are smaller than asked for, {asked: granted} in bytes, and what to do."""
    small = {wanted: had for wanted, had in granted.items() if had < wanted}
    if small:
        wanted, had = max(small.items())
        log.warning(
            "receive buffers are smaller than asked for: bursts may be dropped by the kernel",
            asked=wanted,
            granted=had,
            cure=f"sysctl -w net.core.rmem_max={wanted}, or run with CAP_NET_ADMIN",
        )
