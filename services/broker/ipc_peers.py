"""Access to the bus: by ipc for the broker's own user, and the transmitter's when root started both; TCP as set."""

import errno
import os
import pwd
import socket
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import zmq

from shared.bus.endpoint import keep_alive, tcp_endpoint
from shared.log import get_logger
from shared.net.addresses import Endpoint, resolve
from shared.net.sockets import NOT_HERE
from shared.process.lifecycle import FAILED, OperatorError

log = get_logger()


def transmitters_group(user: str) -> int | None:
    """Return the group by which a transmitter of root reaches the bus once it is `user`; None unless we are root."""
    if os.geteuid():
        return None
    number = int(user) if user.isascii() and user.isdigit() else None
    try:
        return (pwd.getpwnam(user) if number is None else pwd.getpwuid(number)).pw_gid
    except KeyError:
        if number is not None:
            return number  # the transmitter takes a number without a name too
        log.warning(
            "no such user: a transmitter started as root can't reach the bus; set [transmitter] user", user=user
        )
        return None


def let_in(group: int, directory: Path, *sockets: Path) -> None:
    """Let a group enter the directory and connect to its sockets, which libzmq made by the umask.

    A user namespace may have no such group; its root has no other user to become either.
    """
    try:
        for path in (*sockets, directory):
            os.chown(path, -1, group)
            path.chmod(0o750 if path == directory else 0o770)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EPERM):
            raise


def refuse_strangers(sock: zmq.Socket[bytes], directory: Path, group: int | None) -> None:
    """Make a socket that is not bound yet refuse ipc connections of other users (SO_PEERCRED, unix(7)).

    So the directory's mode is not the only protection. Accepted are this user, root, the group if one is given, and the
    group of a directory that is open to its group.
    """
    for user in {os.geteuid(), 0}:
        sock.set(zmq.IPC_FILTER_UID, user)
    found = directory.stat()
    if found.st_mode & 0o050:
        sock.set(zmq.IPC_FILTER_GID, found.st_gid)
    if group is not None:
        sock.set(zmq.IPC_FILTER_GID, group)


def bind_tcp(sock: zmq.Socket[bytes], endpoints: Iterable[Endpoint], side: str) -> None:
    """Bind a side of the broker, `publish` or `subscribe`, to each address of its TCP endpoints. OperatorError."""
    for endpoint in endpoints:
        at = tcp_endpoint(endpoint, side)
        keep_alive(sock)
        try:
            addresses = [str(address[0]) for _, address in resolve(at.host, at.port, socket.SOCK_STREAM)]
        except OSError as error:
            raise OperatorError(
                FAILED, f"[bus] listen: {endpoint}: {error.strerror}; name a host that resolves"
            ) from None
        bound = 0
        for number, address in enumerate(addresses, 1):
            try:
                sock.bind(str(replace(at, host=address)))
                bound += 1
            except zmq.ZMQError as error:
                if error.errno in NOT_HERE and (bound or number < len(addresses)):
                    continue  # without IPv6 a name has only its IPv4 address
                cure = "see which process listens with `ss -ltnp`, or set another [bus] listen"
                raise OperatorError(FAILED, f"[bus] listen: {at}: {os.strerror(error.errno or 0)}; {cure}") from None
