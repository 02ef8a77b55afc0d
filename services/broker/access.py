"""Who may reach the bus besides the broker's own user: the transmitter, when root started both."""

import errno
import os
import pwd
from pathlib import Path

import structlog

log = structlog.get_logger()


def transmitters_group(user: str) -> int | None:
    """The group by which a transmitter that root started reaches the bus once it is `user`; None unless we are root."""
    if os.geteuid():
        return None
    number = int(user) if user.isascii() and user.isdigit() else None
    try:
        return (pwd.getpwnam(user) if number is None else pwd.getpwuid(number)).pw_gid
    except KeyError:
        if number is not None:
            return number  # as the transmitter takes a number that has no name
        log.warning(
            "no such user: a transmitter started as root can't reach the bus; set [transmitter] user", user=user
        )
        return None


def let_in(group: int, directory: Path, *sockets: Path) -> None:
    """Let a group enter the directory and connect to its sockets, which libzmq made by the umask.

    A user namespace may have no such group; root of that one has no other user to become either.
    """
    try:
        for path in (*sockets, directory):
            os.chown(path, -1, group)
            path.chmod(0o750 if path == directory else 0o770)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EPERM):
            raise
