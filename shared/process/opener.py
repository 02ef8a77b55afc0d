"""The steps from a privileged start to a service without privilege: settings, user, bus directory, exec.

Standard library alone, since all of it runs with privilege. A service has an opener of its own, which opens what needs
the privilege in between.
"""

import argparse
import errno
import os
import pwd
import signal
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, NamedTuple

from shared.process.privileges import outside_uid
from shared.settings.location import settings_file

NOT_PERMITTED: Final = 77
DEFAULT_USER: Final = "nobody"
DEFAULT_DIRECTORY: Final = "$XDG_RUNTIME_DIR/fanwire"
"""The default in `shared.settings.tables`, which needs more than the standard library."""


class User(NamedTuple):
    """The user to become."""

    name: str
    uid: int
    gid: int


def begin() -> None:
    """Make what is opened from now on no standard descriptor, and ignore SIGHUP until the service handles it."""
    while os.open(os.devnull, os.O_RDWR) < 3:
        pass  # a raw socket must not get a closed standard descriptor: stderr would leave by it as frames
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # an exec keeps this


def clean_environment() -> dict[str, str]:
    """Return the environment without what changes the loading of programs and modules."""
    return {name: text for name, text in os.environ.items() if not name.startswith(("LD_", "PYTHON"))}


def hand_on_only(kept: set[int]) -> None:
    """Let an exec hand on these descriptors alone: none that this process was started with, or a name service left."""
    for entry in list(Path("/proc/self/fd").iterdir()):
        with suppress(OSError):  # the listing's own descriptor is closed by now
            os.set_inheritable(int(entry.name), int(entry.name) in kept)


def refuse(service: str, reason: str) -> int:
    """Say why a service does not start; return the exit code."""
    print(f"fanwire {service}: {reason}", file=sys.stderr)
    return NOT_PERMITTED


def read_settings(arguments: Sequence[str]) -> tuple[argparse.Namespace, dict[str, Any]]:
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


def setting(settings: Mapping[str, Any], section: str, key: str, default: str) -> str:
    """Return a text of the settings, as the environment or the file has it, else the default."""
    found = settings.get(section)
    value = found.get(key) if isinstance(found, dict) else None
    return os.environ.get(f"FANWIRE_{section}__{key}".upper()) or (value if isinstance(value, str) else default)


def find_user(settings: Mapping[str, Any], section: str) -> User | None:
    """Return the user to become, or None to stay the same; PermissionError when that is root, which no one may stay.

    It is the `user` of the section of a service.
    """
    if 0 not in os.getresuid():
        return None
    name = setting(settings, section, "user", DEFAULT_USER)
    uid = int(name) if name.isascii() and name.isdigit() and len(name) <= 10 else None
    try:
        entry = pwd.getpwnam(name) if uid is None else pwd.getpwuid(uid)
        user = User(name, entry.pw_uid, entry.pw_gid)
    except (KeyError, ValueError):
        if uid is None:
            raise _unfit(section, name, "there is no such user; name another") from None
        user = User(name, uid, uid)
    if user.uid == 0:
        raise _unfit(section, name, "that is root too; name another")
    if outside_uid(user.uid) is not None:
        return user
    if outside_uid(0) == 0:
        raise _unfit(section, name, "it is not in this user namespace, whose root is root outside too")
    return None  # root of a namespace like that of `unshare -Ur`, with no privilege outside


def _unfit(section: str, name: str, why: str) -> PermissionError:
    return PermissionError(errno.EPERM, f"root would become [{section}] user {name!r}, but {why}")


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


def check_readable(user: User, section: str, program: Path, config: Path | None) -> None:
    """Check that the user can run the program, and read the settings. PermissionError with the cure."""
    try:
        with _acting_as(user):
            for path in (sys.executable, os.__file__, str(program), config or os.__file__):
                os.close(os.open(path, os.O_RDONLY))
    except OSError as error:
        why = "it takes CAP_SETUID and CAP_SETGID to become it"
        if error.filename:
            why = f"it can't read {error.filename}; let all users read that (Python: use Debian's), or name another"
        raise _unfit(section, user.name, why) from None


def bus_directory(settings: Mapping[str, Any]) -> Path | None:
    """Return the bus directory by the name it has for root; None where systemd names it for any user."""
    text = setting(settings, "bus", "directory", DEFAULT_DIRECTORY)
    if text == DEFAULT_DIRECTORY and os.environ.get("RUNTIME_DIRECTORY"):
        return None
    expanded = os.path.expandvars(text)
    return Path("/tmp/fanwire-0" if "$" in expanded else expanded)


def hand_on(directory: Path, user: User, kept: set[int]) -> str:
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
