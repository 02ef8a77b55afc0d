"""Opens the raw sockets, gives up every privilege for good, and becomes the transmitter, which inherits the sockets.

Standard library alone, since all its imports run with privilege. capabilities(7), credentials(7), user_namespaces(7).
"""

import argparse
import ctypes
import errno
import os
import pwd
import signal
import socket
import struct
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, NamedTuple

from services.transmitter.privileges import ACCOUNTS, KINDS, SO_LOCK_FILTER, Opened, outside_uid, relinquish, unparse
from shared.settings.location import settings_file

PROGRAM: Final = Path(__file__).resolve().with_name("__main__.py")
NOT_PERMITTED: Final = 77
DEFAULT_USER: Final = "nobody"
DEFAULT_DIRECTORY: Final = "$XDG_RUNTIME_DIR/fanwire"
"""The default in `shared.settings.tables`, which needs more than the standard library."""
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


class User(NamedTuple):
    """The user to become."""

    name: str
    uid: int
    gid: int


def open_and_exec(arguments: Sequence[str]) -> int:
    """Become the transmitter, with its sockets or with the reason why there are none; 77 when it must not run."""
    while os.open(os.devnull, os.O_RDWR) < 3:
        pass  # a raw socket must not get a closed standard descriptor: stderr would leave by it as frames
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until the transmitter handles it; an exec keeps this
    options, settings = _read(arguments)
    user, opened, reason = None, {}, ""
    try:
        user = find_user(_setting(settings, "transmitter", "user", DEFAULT_USER))
        if user:
            _check_readable(user, options.config)
        opened = open_sockets() if not options.check else {}
    except OSError as error:
        user, reason = None, f"{WITHOUT}{error.strerror}"
        if options.require_privilege:
            return _refuse(reason)
    kept = {0, 1, 2, *(sock.fileno() for sockets in opened.values() for sock in sockets)}
    environment = {name: text for name, text in os.environ.items() if not name.startswith(("LD_", "PYTHON"))}
    try:
        if user and not options.check and (directory := _bus_directory(settings)):
            environment["FANWIRE_BUS__DIRECTORY"] = _hand_on(directory, user, kept)
            environment[ACCOUNTS] = _hand_on_accounts(directory, user, kept)
        relinquish(user)
        # It gets no descriptor either that this process was started with, or that a name service left open.
        for entry in list(Path("/proc/self/fd").iterdir()):
            with suppress(OSError):  # the listing's own descriptor is closed by now
                os.set_inheritable(int(entry.name), int(entry.name) in kept)
        inherited = f"none:{reason}" if reason else unparse(opened)
        command = [sys.executable, "-I", str(PROGRAM), "--inherited", inherited, *arguments]
        os.execve(sys.executable, command, environment)
    except OSError as error:
        return _refuse(f"{reason or 'it must give up its privileges, and failed'}: {error}")


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


def _refuse(reason: str) -> int:
    print(f"fanwire transmitter: {reason}", file=sys.stderr)
    return NOT_PERMITTED


def _read(arguments: Sequence[str]) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Return the options and settings that matter here; the transmitter will report any errors in them."""
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--require-privilege", action="store_true")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args([])
    with suppress(argparse.ArgumentError):
        options, _ = parser.parse_known_args(arguments)
    options.config = settings_file(options.config)
    if not options.config or not options.config.is_file():
        options.config = None  # no pipe either: what is read from it here would be missing from the settings
        return options, {}
    try:
        return options, tomllib.loads(options.config.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return options, {}


def _setting(settings: Mapping[str, Any], section: str, key: str, default: str) -> str:
    found = settings.get(section)
    value = found.get(key) if isinstance(found, dict) else None
    return os.environ.get(f"FANWIRE_{section}__{key}".upper()) or (value if isinstance(value, str) else default)


def find_user(name: str) -> User | None:
    """Return the user to become, or None to stay the same; PermissionError when that is root, which no one may stay."""
    if 0 not in os.getresuid():
        return None
    uid = int(name) if name.isascii() and name.isdigit() and len(name) <= 10 else None
    try:
        entry = pwd.getpwnam(name) if uid is None else pwd.getpwuid(uid)
        user = User(name, entry.pw_uid, entry.pw_gid)
    except (KeyError, ValueError):
        if uid is None:
            raise _unfit(name, "there is no such user; name another") from None
        user = User(name, uid, uid)
    if user.uid == 0:
        raise _unfit(name, "that is root too; name another")
    if outside_uid(user.uid) is not None:
        return user
    if outside_uid(0) == 0:
        raise _unfit(name, "it is not in this user namespace, whose root is root outside too")
    return None  # root of a namespace like that of `unshare -Ur`, with no privilege outside


def _unfit(name: str, why: str) -> PermissionError:
    return PermissionError(errno.EPERM, f"root would become [transmitter] user {name!r}, but {why}")


@contextmanager
def _acting_as(user: User) -> Iterator[None]:
    """Act with the user's ids in effect, and no capabilities: they go and come with root's ids (capabilities(7))."""
    group = os.getegid()
    try:
        os.setgroups([])
        os.setegid(user.gid)
        os.seteuid(user.uid)
        yield
    finally:
        os.seteuid(0)
        os.setegid(group)


def _check_readable(user: User, config: Path | None) -> None:
    try:
        with _acting_as(user):
            for path in (sys.executable, os.__file__, str(PROGRAM), config or os.__file__):
                os.close(os.open(path, os.O_RDONLY))
    except OSError as error:
        why = "it takes CAP_SETUID and CAP_SETGID to become it"
        if error.filename:
            why = f"it can't read {error.filename}; let all users read that (Python: use Debian's), or name another"
        raise _unfit(user.name, why) from None


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


def _bus_directory(settings: Mapping[str, Any]) -> Path | None:
    """Return the bus directory by the name it has for root; None where systemd names it for any user."""
    text = _setting(settings, "bus", "directory", DEFAULT_DIRECTORY)
    if text == DEFAULT_DIRECTORY and os.environ.get("RUNTIME_DIRECTORY"):
        return None
    expanded = os.path.expandvars(text)
    return Path("/tmp/fanwire-0" if "$" in expanded else expanded)


def _hand_on(directory: Path, user: User, kept: set[int]) -> str:
    """Return a path by which the user will reach the directory: by a descriptor where a parent is closed to it."""
    with suppress(OSError):  # the transmitter will report what is wrong with it
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)  # the broker, which may come later, lets the user in
        descriptor = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            with _acting_as(user):
                directory.stat()
        except PermissionError:
            kept.add(descriptor)
            return f"/proc/self/fd/{descriptor}"
    return str(directory)
