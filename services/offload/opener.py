"""Starts the applier with CAP_NET_ADMIN alone, gives up every privilege for good, and becomes the planner.

Standard library alone, since all its imports run with privilege. capabilities(7), unix(7).
"""

import errno
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from shared.process.opener import (
    begin,
    bus_directory,
    check_readable,
    clean_environment,
    find_user,
    hand_on,
    hand_on_only,
    read_settings,
    refuse,
)
from shared.process.privileges import CAP_NET_ADMIN, own_status, relinquish

SERVICE: Final = "offload"
PROGRAM: Final = Path(__file__).resolve().with_name("__main__.py")
WITHOUT: Final = "the kernel makes no copies, everything else works; "
CURE: Final = (
    "CAP_NET_ADMIN is missing: let root start it, or its systemd unit, or `setpriv --reuid USER --regid GROUP "
    "--init-groups --inh-caps +net_admin --ambient-caps +net_admin fanwire offload`; in a container NET_ADMIN must be "
    "effective for its user"
)
NOT_WANTED: Final = "none:"
"""The value of `--inherited` where the settings name no interface: nothing is missing."""


def open_and_exec(arguments: Sequence[str]) -> int:
    """Become the planner, joined to an applier or with the reason why there is none; 77 when it must not run."""
    begin()
    options, settings = read_settings(arguments)
    user, reason = None, ""
    wanted = _names_interfaces(settings) and not options.check
    try:
        user = find_user(settings, SERVICE)
        if user:
            check_readable(user, SERVICE, PROGRAM, options.config)
        if wanted and not int(own_status()["CapEff"], 16) >> CAP_NET_ADMIN & 1:
            raise PermissionError(errno.EPERM, CURE)
    except OSError as error:
        user, reason = None, f"{WITHOUT}{error.strerror}"
        if options.require_privilege:
            return refuse(SERVICE, reason)
    kept, environment, inherited = {0, 1, 2}, clean_environment(), f"{NOT_WANTED}{reason}"
    try:
        if user and not options.check and (directory := bus_directory(settings)):
            environment["FANWIRE_BUS__DIRECTORY"] = hand_on(directory, user, kept)
        if wanted and not reason:
            relinquish(user, keep=1 << CAP_NET_ADMIN)
            user = None  # by now it is that user
            channel, process = _start_applier(arguments, environment)
            kept.add(channel)
            inherited = f"{channel}:{process}"
        relinquish(user)
        hand_on_only(kept)
        command = [sys.executable, "-I", str(PROGRAM), "--inherited", inherited, *arguments]
        os.execve(sys.executable, command, environment)
    except OSError as error:
        return refuse(SERVICE, f"{reason or 'it must give up its privileges, and failed'}: {error}")


def _names_interfaces(settings: Mapping[str, Any]) -> bool:
    section = settings.get(SERVICE)
    return isinstance(section, dict) and bool(section.get("interfaces"))


def _start_applier(arguments: Sequence[str], environment: Mapping[str, str]) -> tuple[int, int]:
    """Start the applier, with one end of a socket pair and no other descriptor; return the other end, and its pid."""
    ours, theirs = socket.socketpair()
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)  # before the first request: each tells who has sent it
    hand_on_only({0, 1, 2, theirs.fileno()})
    command = [sys.executable, "-I", str(PROGRAM), "--applier", str(theirs.fileno()), *arguments]
    process = os.posix_spawn(sys.executable, command, environment)
    theirs.close()
    return ours.detach(), process
