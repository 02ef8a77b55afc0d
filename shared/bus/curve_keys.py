"""The bus's CURVE keys: a file a key, `ROLE.secret` for the role itself, `ROLE.public` for the broker's list.

A role is the name of a service, or `operator` for the commands. Another process of a role may have a key of its own,
known to the broker as `ROLE.ANYTHING.public`. A bad key file raises SettingsError: the operator can mend it.
"""

import errno
import os
import pwd
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import zmq

from shared.settings.explain import SettingsError

BROKER: Final = "broker"
ROLES: Final = (
    *(BROKER, "gateway", "ingest", "forwarder", "transmitter"),
    *("offload", "journal", "console", "uplink", "operator"),
)

FORM: Final = re.compile(rb"[!-~]{40}")
"""Of 32 bytes in Z85 (ZeroMQ RFC 32); libzmq would read up to a NUL."""


@dataclass(frozen=True, slots=True)
class Keys:
    """The key pair by which a process proves its role, and the broker's public key; each as Z85 text."""

    public: bytes
    secret: bytes
    broker: bytes

    def __repr__(self) -> str:
        return f"Keys({self.public.decode()})"  # a secret must not get into a log


def load_keys(directory: Path, role: str) -> Keys:
    """Read a role's secret key and the broker's public one."""
    secret = _read_secret(directory / f"{role}.secret")
    return Keys(zmq.curve_public(secret), secret, _read(directory / f"{BROKER}.public"))


def load_roles(directory: Path) -> dict[bytes, str]:
    """Read the broker's list: the role that each public key stands for."""
    roles: dict[bytes, str] = {}
    for path in sorted(directory.glob("*.public")):
        role, key = path.name.partition(".")[0], _read(path)
        if role not in ROLES:
            raise SettingsError(
                f"{path}: {role!r} is not a role; expected one of {', '.join(ROLES)} before the first dot"
            )
        if roles.setdefault(key, role) != role:
            raise SettingsError(f"{path}: the same key as that of {roles[key]}; make a key for each role")
    return roles


def write_keys(directory: Path, roles: Iterable[str]) -> Iterator[tuple[Path, Path]]:
    """Make a key pair a role; yield its files, secret and public.

    FileExistsError, and no key is made, when one is there.
    """
    pairs = [(directory / f"{role}.secret", directory / f"{role}.public") for role in roles]
    if there := [path for pair in pairs for path in pair if path.exists()]:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(there[0]))
    for secret, public in pairs:
        public_key, secret_key = zmq.curve_keypair()
        for path, key, mode in ((secret, secret_key, 0o600), (public, public_key, 0o644)):
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
                file.write(key + b"\n")
        yield secret, public


def _read_secret(path: Path) -> bytes:
    key = _read(path)
    found = path.stat()
    # A file of another owner was opened to us by its group or an access list, as systemd's LoadCredential= does.
    if stat.S_IMODE(found.st_mode) & (0o077 if found.st_uid == os.geteuid() else 0o007):
        raise SettingsError(f"{path}: other users can read this secret key; `chmod 600 {path}`")
    return key


def _read(path: Path) -> bytes:
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise SettingsError(f"{path}: there is no such key; make keys with `fanwire keys {path.parent}`") from None
    except PermissionError:
        raise SettingsError(
            f"{path}: {_whoami()} can't read it; `chown {_whoami()} {path}`, and open its directory"
        ) from None
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror}") from None
    key = text.removesuffix(b"\n")
    try:
        if not FORM.fullmatch(key):
            raise ValueError
        zmq.curve_public(key)  # tells whether it is Z85; for a public key the result means nothing
    except (zmq.ZMQError, ValueError):
        raise SettingsError(f"{path}: not a key; expected 40 characters, as `fanwire keys` writes them") from None
    return key


def _whoami() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())
