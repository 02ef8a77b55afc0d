"""Listening sockets, bound or inherited, and what Linux offers beyond the stdlib: forced buffers, drop counts."""

import contextlib
import errno
import os
import socket
import struct
import time
from collections.abc import Callable, MutableMapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Protocol

from shared.net.addresses import Endpoint, SocketAddress

UCRED: Final = struct.Struct("=iII")
"""struct ucred."""
KINDS: Final = {
    "tcp": socket.SOCK_STREAM,
    "tls": socket.SOCK_STREAM,
    "http": socket.SOCK_STREAM,
    "https": socket.SOCK_STREAM,
    "unix": socket.SOCK_STREAM,
    "udp": socket.SOCK_DGRAM,
    "unixgram": socket.SOCK_DGRAM,
}
"""The kind of socket that serves a scheme."""
CHECKSUM_SECONDS: Final = 4.5
NOT_HERE: Final = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
"""Errors of a host without IPv6 for one of several addresses of a name; the others serve."""

KEEPALIVE: Final = (
    (socket.TCP_KEEPIDLE, 30),
    (socket.TCP_KEEPINTVL, 10),
    (socket.TCP_KEEPCNT, 3),
    (socket.TCP_USER_TIMEOUT, 60_000),
)
"""A peer that has vanished is noticed after a minute. Seconds; and milliseconds for unacknowledged bytes, during which
there are no probes (tcp(7))."""

LISTEN_FDS_START: Final = 3
"""The first descriptor that a service manager passes (sd_listen_fds(3))."""

SO_SNDBUFFORCE: Final = 32
SO_RCVBUFFORCE: Final = 33
SO_MEMINFO: Final = 55
MEMINFO: Final = struct.Struct("=9I")
"""Nine u32, the last of them the drop count (linux/sock_diag.h, SK_MEMINFO_DROPS)."""

Prepare = Callable[[socket.socket], None]
"""Sets options before a socket is bound; accepted connections inherit most of them."""


class Bind(Protocol):
    """Binds every address of an endpoint."""

    def __call__(self, endpoint: Endpoint, prepare: Prepare, path_mode: int = ...) -> list[socket.socket]:
        """Return the sockets. OSError."""


class PathSocket(socket.socket):
    """A socket that this process has bound to a path."""

    file: tuple[int, int] | None = None
    """Device and inode of the file made there."""

    def bind(self, path: Any) -> None:
        """Bind a path, and remember the file made there."""
        super().bind(path)
        self.file = _file_at(path)

    @property
    def in_place(self) -> bool:
        """Return whether the path still leads here: others may have removed it, and made something else there."""
        return self.file is not None and self.file == _file_at(self.getsockname())


def _file_at(path: str) -> tuple[int, int] | None:
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


class InheritedSocket(socket.socket):
    """A listening socket that the service manager holds too: its queue and its path outlive this process."""


def inherited(environment: MutableMapping[str, str] = os.environ) -> list[InheritedSocket]:
    """Take the sockets that a service manager passed to this process, non-blocking (sd_listen_fds(3)); often none.

    OSError when one is not a socket. Their variables are removed, so that they are not taken twice.
    """
    process, count, _ = (environment.pop(name, "") for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"))
    if process != str(os.getpid()):
        return []
    taken = [InheritedSocket(fileno=LISTEN_FDS_START + number) for number in range(int(count))]
    for sock in taken:
        sock.setblocking(False)
        sock.set_inheritable(False)
    return taken


def bind_endpoint(
    endpoint: Endpoint, prepare: Prepare, path_mode: int = 0o666, held: list[socket.socket] | None = None
) -> list[socket.socket]:
    """Bind every address of an endpoint, non-blocking; a path gets `path_mode`. OSError when none can be bound.

    `[::]` takes IPv4 too, and where this host has no IPv6, IPv4 alone. Any other IPv6 address takes IPv6 alone, so that
    `localhost` can bind both of its addresses. Where one of `held` is bound to an address already, that socket serves
    it: it leaves the list, and is not closed on an error.
    """
    kind, held = KINDS[endpoint.scheme], [] if held is None else held
    before = list(held)
    if endpoint.path:
        return [_take(held, kind, endpoint.path) or _bind_path(endpoint.path, kind, prepare, path_mode)]
    bound: list[socket.socket] = []
    lacking: OSError | None = None
    for family, address in endpoint.addresses(kind):
        try:
            bound.append(_take(held, kind, address) or _bind(socket.socket(family, kind), address, prepare))
        except OSError as error:
            if error.errno not in NOT_HERE:
                for sock in bound:
                    if sock not in before:
                        sock.close()
                raise
            lacking = error
    if lacking is not None and not bound:
        if endpoint.host == "::":
            return bind_endpoint(replace(endpoint, host="0.0.0.0"), prepare, held=held)
        raise lacking
    return bound


def try_endpoint(
    endpoint: Endpoint,
    prepare: Prepare,
    path_mode: int = 0o666,  # noqa: ARG001  # nothing is made at a path
    *,
    made: Path,
    port_too: bool,
) -> list[socket.socket]:
    """Bind every address of an endpoint as `bind_endpoint` does, in vain: a running service loses nothing by it.

    The port is another one, unless it is wanted too. A path is not bound; its directory is looked at, unless it is
    `made` at the start, and so is a file there. OSError as from `bind_endpoint`.
    """
    if not endpoint.path:
        return bind_endpoint(endpoint if port_too else replace(endpoint, port=0), prepare)
    parent = Path(endpoint.path).parent
    if parent != made and not os.access(parent, os.W_OK | os.X_OK):
        number = errno.EACCES if parent.is_dir() else errno.ENOENT
        raise OSError(number, os.strerror(number))
    if port_too or not Path(endpoint.path).is_socket():
        _is_left_over(endpoint.path, KINDS[endpoint.scheme])
    return []


def _take(held: list[socket.socket], kind: socket.SocketKind, address: SocketAddress | str) -> socket.socket | None:
    for sock in held:
        if (sock.type, sock.getsockname()) == (kind, address):
            held.remove(sock)
            return sock
    return None


def _bind(sock: socket.socket, address: SocketAddress | str, prepare: Prepare) -> socket.socket:
    try:
        sock.setblocking(False)
        prepare(sock)
        if sock.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(address[0] != "::"))
        sock.bind(address)
    except OSError:
        sock.close()
        raise
    return sock


def _bind_path(path: str, kind: socket.SocketKind, prepare: Prepare, mode: int) -> socket.socket:
    """Bind an AF_UNIX path. A file that a process has left there is removed; one of a live process is not."""
    if _is_left_over(path, kind):
        Path(path).unlink()
    before = os.umask(0o777 & ~mode)
    try:
        sock = PathSocket(socket.AF_UNIX, kind)
        _bind(sock, path, prepare)
        return sock
    finally:
        os.umask(before)


def _is_left_over(path: str, kind: socket.SocketKind) -> bool:
    """Return whether a process that is gone has left a socket there. OSError where something else is."""
    if not os.path.lexists(path):
        return False
    if not Path(path).is_socket():
        raise OSError(errno.EEXIST, "a file that is no socket is there")
    with socket.socket(socket.AF_UNIX, kind) as probe:
        probe.setblocking(False)
        try:
            with contextlib.suppress(BlockingIOError):  # its queue is full: it stands still, but lives
                probe.connect(path)
        except ConnectionRefusedError:
            return True
    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))


def prepare_listener(listener: socket.socket) -> None:
    """Set options that accepted connections inherit, and SO_REUSEADDR: a restart need not wait for TIME_WAIT."""
    if listener.family == socket.AF_UNIX:
        return
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in KEEPALIVE:
        listener.setsockopt(socket.IPPROTO_TCP, option, value)


def close_listener(sock: socket.socket) -> None:
    """Close a listening socket; remove the file of a path first if it is still its own.

    The file of an inherited socket stays: the service manager listens on it for our successor.
    """
    if isinstance(sock, PathSocket) and sock.in_place:
        Path(sock.getsockname()).unlink(missing_ok=True)
    sock.close()


def enlarge_receive_buffer(sock: socket.socket, wanted: int) -> int:
    """Ask for a receive buffer, by force where allowed, else up to net.core.rmem_max; return bytes granted.

    An inherited socket that is large enough keeps its buffer: the service manager may have given more than we could.
    """
    has = receive_buffer(sock)
    if isinstance(sock, InheritedSocket) and has >= wanted:
        return has
    return _enlarge(sock, SO_RCVBUFFORCE, socket.SO_RCVBUF, wanted)


def receive_buffer(sock: socket.socket) -> int:
    """Return the bytes of the receive buffer as they are asked for: the kernel doubles them for its own records."""
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) // 2


def enlarge_send_buffer(sock: socket.socket, wanted: int) -> int:
    """Ask for a send buffer, by force where allowed, else up to net.core.wmem_max; return bytes granted."""
    return _enlarge(sock, SO_SNDBUFFORCE, socket.SO_SNDBUF, wanted)


def _enlarge(sock: socket.socket, by_force: int, by_leave: int, wanted: int) -> int:
    try:
        sock.setsockopt(socket.SOL_SOCKET, by_force, wanted)
    except OSError:  # not permitted, or not known to this kernel
        sock.setsockopt(socket.SOL_SOCKET, by_leave, wanted)
    return sock.getsockopt(socket.SOL_SOCKET, by_leave) // 2  # the kernel doubles it for its own records


def kernel_drops(sock: socket.socket) -> int:
    """Return the datagrams that the kernel has dropped at this socket since it was opened, modulo 2**32."""
    return int(MEMINFO.unpack(sock.getsockopt(socket.SOL_SOCKET, SO_MEMINFO, MEMINFO.size))[-1])


def checksum_errors() -> int:
    """Return the UDP datagrams that this network namespace's kernel has dropped for a wrong checksum, IPv4 and IPv6."""
    names, values = (
        line.split() for line in _read_proc("/proc/self/net/snmp").splitlines() if line.startswith(b"Udp:")
    )
    errors = int(dict(zip(names, values, strict=True)).get(b"InCsumErrors", 0))
    with contextlib.suppress(FileNotFoundError):  # where IPv6 is switched off
        _, _, rest = _read_proc("/proc/self/net/snmp6").partition(b"Udp6InCsumErrors")
        errors += int(rest.partition(b"\n")[0] or 0)
    return errors


class ChecksumErrors:
    """`checksum_errors`, read every few seconds: the kernel takes as long for it as a worker for a whole report."""

    def __init__(self) -> None:
        self._count, self._read_at = 0, 0.0

    def count(self) -> int:
        """Return what was read last."""
        if (now := time.monotonic()) >= self._read_at:
            self._count, self._read_at = checksum_errors(), now + CHECKSUM_SECONDS
        return self._count


def _read_proc(path: str) -> bytes:
    """Return a short file of the kernel's; a third of the calls that a file object makes."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(descriptor, 1 << 16)
    finally:
        os.close(descriptor)


def bound_endpoint(scheme: str, sock: socket.socket) -> Endpoint:
    """Return the endpoint that a listening socket is bound to; the settings may name several by one host name."""
    name = sock.getsockname()
    return Endpoint(scheme, path=name) if sock.family == socket.AF_UNIX else Endpoint(scheme, *name[:2])


def peer_credentials(sock: socket.socket) -> tuple[int, int, int]:
    """Return process, user and group that made the other end of an AF_UNIX connection (unix(7), SO_PEERCRED)."""
    pid, uid, gid = UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, UCRED.size))
    return pid, uid, gid
