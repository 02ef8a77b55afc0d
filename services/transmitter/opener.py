"""Opens the raw sockets, gives up every privilege for good, and becomes the transmitter, which inherits the sockets.

Standard library alone, since all its imports run with privilege. capabilities(7), credentials(7), user_namespaces(7).
"""

import ctypes
import errno
import os
import socket
import struct
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from services.transmitter.privileges import ACCOUNTS, KINDS, SO_LOCK_FILTER, Opened, unparse
from shared.process.opener import (
    User,
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
from shared.process.privileges import relinquish

SERVICE: Final = "transmitter"
PROGRAM: Final = Path(__file__).resolve().with_name("__main__.py")
SOCKETS: Final = 8
"""Sockets of each kind: an interface that is stuck fills the send buffer of one, and traffic by others goes on. Two of
AF_PACKET are for requested frames (`raw_frames`)."""
SEND_BUFFER: Final = 4 << 20
"""Bytes. Only CAP_NET_ADMIN gets more than net.core.wmem_max: asked for here: the transmitter has none."""
SO_ATTACH_FILTER: Final = 26
SO_SNDBUFFORCE: Final = 32
RECVERR: Final = {
    "ip4": (socket.IPPROTO_IP, 11),
    "ip6": (socket.IPPROTO_IPV6, 25),
}
"""IP_RECVERR, IPV6_RECVERR: without it raw IP hides from its sender that a queue was full (raw(7))."""
RECEIVE_NOTHING: Final = ctypes.create_string_buffer(struct.pack("=HBBI", 0x06, 0, 0, 0))
"""A filter of one instruction, `return 0` (struct sock_filter, linux/filter.h)."""

WITHOUT: Final = 'no raw sockets: copies with source = "original" and raw frames are refused, everything else works; '
CURES: Final = {
    errno.EPERM: "CAP_NET_RAW is missing: let root start it, or its systemd unit, or `setpriv --reuid USER --regid "
    "GROUP --init-groups --inh-caps +net_raw --ambient-caps +net_raw fanwire transmitter`; to try it out, `unshare "
    "-Urn sh -c 'ip link set lo up; fanwire run'`; in a container NET_RAW must be effective for its user; a setcap on "
    "python counts for nothing under no_new_privs",
    errno.EACCES: "a security module forbids it: see `aa-status` (AppArmor) or `ausearch -m avc` (SELinux)",
    errno.EAFNOSUPPORT: "the kernel has no AF_PACKET, or RestrictAddressFamilies= of a systemd unit leaves it out",
}


def open_and_exec(arguments: Sequence[str]) -> int:
    """Become the transmitter, with its sockets or with the reason why there are none; 77 when it must not run."""
    begin()
    options, settings = read_settings(arguments)
    user, opened, reason = None, {}, ""
    try:
        user = find_user(settings, SERVICE)
        if user:
            check_readable(user, SERVICE, PROGRAM, options.config)
        opened = open_sockets() if not options.check else {}
    except OSError as error:
        user, reason = None, f"{WITHOUT}{error.strerror}"
        if options.require_privilege:
            return refuse(SERVICE, reason)
    kept = {0, 1, 2, *(sock.fileno() for sockets in opened.values() for sock in sockets)}
    environment = clean_environment()
    try:
        if user and not options.check and (directory := bus_directory(settings)):
            environment["FANWIRE_BUS__DIRECTORY"] = hand_on(directory, user, kept)
            environment[ACCOUNTS] = _hand_on_accounts(directory, user, kept)
        relinquish(user)
        hand_on_only(kept)
        inherited = f"none:{reason}" if reason else unparse(opened)
        command = [sys.executable, "-I", str(PROGRAM), "--inherited", inherited, *arguments]
        os.execve(sys.executable, command, environment)
    except OSError as error:
        return refuse(SERVICE, f"{reason or 'it must give up its privileges, and failed'}: {error}")


def _hand_on_accounts(directory: Path, user: User, kept: set[int]) -> str:
    """Return a path by which the user reaches the file of its accounts; in root's directory it may make none."""
    name = "accounts.transmitter"
    try:
        inside = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            if os.fstat(inside).st_uid:  # its owner could put another file there, to have it given away
                raise PermissionError
            with suppress(FileExistsError):
                made = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=inside)
                os.fchown(made, user.uid, user.gid)
                os.close(made)
            descriptor = os.open(name, os.O_RDWR | os.O_NOFOLLOW, dir_fd=inside)
        finally:
            os.close(inside)
    except OSError:
        return str(directory / name)  # the transmitter will say that it can't use it
    kept.add(descriptor)
    return f"/proc/self/fd/{descriptor}"


def open_sockets() -> Opened:
    """Open the sockets of each kind, IPv6 where there is any; or none at all: OSError, with the cures."""
    opened: Opened = {}
    try:
        for kind in KINDS:
            opened[kind] = []
            for _ in range(SOCKETS):
                opened[kind].append(open_socket(kind))
    except OSError as error:
        if kind == "ip6" and error.errno == errno.EAFNOSUPPORT:
            return opened
        for sock in (sock for sockets in opened.values() for sock in sockets):
            sock.close()
        raise OSError(error.errno, f"{error.strerror}; {CURES.get(error.errno or 0, 'see raw(7)')}") from None
    return opened


def open_socket(kind: str) -> socket.socket:
    """Open a raw socket that can only send. OSError when that is not permitted, or not known here."""
    sock = socket.socket(*KINDS[kind])
    # The holder of a packet socket can bind it to a protocol and listen, with no capability at all; but not with this
    # one.
    program = struct.pack("HP", 1, ctypes.addressof(RECEIVE_NOTHING))
    sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)
    sock.setsockopt(socket.SOL_SOCKET, SO_LOCK_FILTER, 1)
    if kind in RECVERR:
        sock.setsockopt(*RECVERR[kind], 1)
    try:
        sock.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, SEND_BUFFER)
    except PermissionError:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
    return sock
