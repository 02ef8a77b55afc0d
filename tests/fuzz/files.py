"""The files that an operator writes or hands over: settings, tokens, keys, other replicators' receivers."""

import argparse
import os
import shutil
import socket
import tempfile
from pathlib import Path
from typing import Any, Final
from unittest import mock

import zmq.utils.z85
from msgspec import structs

from services.gateway.access import read_tokens
from services.gateway.permission import Permissions
from services.gateway.requests import RequestError
from services.operator import imports
from shared.keys import ROLES, load_keys, load_roles
from shared.lifecycle import BAD_SETTINGS, FAILED, OK, OperatorError
from shared.settings import Gateway, Settings, SettingsError
from shared.settings_file import load, render
from tests.fuzz.corpus import split_parts
from tests.fuzz.printing import check_line, printed

_directory: Final = Path(tempfile.gettempdir(), f"fanwire-fuzz-{os.getpid()}")
MAX_KEYS: Final = 4


def _written(data: bytes) -> Path:
    """A file of ours with this in it, which nobody else can read."""
    _directory.mkdir(mode=0o700, exist_ok=True)
    path = _directory / "file.toml"
    path.write_bytes(data)
    path.chmod(0o600)
    return path


def settings(data: bytes) -> None:
    """A settings file is read, and prints as one that is read to the same, or it is one line of SettingsError."""
    try:
        found = load(_written(data), {})
        assert load(_written(render(found).encode()), {}) == found
    except SettingsError as error:
        check_line(error)


def environment(data: bytes) -> None:
    """Variables, NAME=VALUE a line, override settings or are one line of SettingsError."""
    lines = [line.partition("=") for line in data.decode(errors="replace").splitlines()]
    try:
        load(None, {"FANWIRE_" + name: value for name, _, value in lines})
    except SettingsError as error:
        check_line(error)


def tokens(data: bytes) -> None:
    """A file of tokens gives those that it would give as settings, each to its holder, or it is one line."""
    path = _written(data)
    try:
        found = read_tokens(Settings(gateway=Gateway(tokens=str(path))))
    except OperatorError as error:
        assert error.exit_code == BAD_SETTINGS
        check_line(error)
        return
    assert load(path, {}).tokens == found
    permissions = Permissions(found)
    for token in found:
        if token.certificate is not None:
            assert permissions.of_certificate(token.certificate).holder == token.name
    try:
        permissions.of_token(data.decode())
    except RequestError as refused:
        assert refused.error == "not_permitted"
    else:
        raise AssertionError("what is no token of theirs was taken for one")


def keys(data: bytes) -> None:
    """A directory of key files, each a name and its content, gives keys that are 32 bytes each, or it is one line."""
    shutil.rmtree(_directory, ignore_errors=True)
    _directory.mkdir(mode=0o700)
    parts = split_parts(data, 2 * MAX_KEYS)
    for name, content in zip(parts[::2], parts[1::2], strict=False):
        path = _directory / os.fsdecode(name.translate(None, b"/\0")[:200])
        if path.parent == _directory and path != _directory and not path.exists():
            path.write_bytes(content)
            path.chmod(0o600)
    found: list[bytes] = []
    for role in ROLES:
        try:
            loaded = load_keys(_directory, role)
            found += [loaded.secret, loaded.public, loaded.broker]
            assert loaded.secret.decode() not in f"{loaded!r} {loaded}"
        except SettingsError as error:
            check_line(error)
    try:
        roles = load_roles(_directory)
        assert set(roles.values()) <= set(ROLES)
        found += roles
    except SettingsError as error:
        check_line(error)
    for key in found:
        assert zmq.utils.z85.encode(zmq.utils.z85.decode(key)) == key


def _import(tool: str, data: bytes) -> None:
    """Import a receiver file whose first byte says how: settings that load, and a word for each line that has none."""
    path = _written(data[1:])
    source = "original" if data[:1] > b"\x7f" else "relay"
    arguments = argparse.Namespace(tool=tool, file=path, stream="s", listen=["udp://[::]:2000"], source=source)
    try:
        with mock.patch("shared.addresses.socket.getaddrinfo", _numeric), printed(escaped=False) as (out, err):
            code = imports.run(arguments, Settings())
    except SettingsError as error:
        check_line(error)
        assert ": line " in str(error)
        return
    made = load(_written(out.getvalue().encode()), {})
    assert [stream.name for stream in made.streams] == ["s"]
    assert {collector.source for collector in made.collectors} <= {source}
    left_out = any(": left out: " in line for line in err.getvalue().splitlines())
    assert code == (FAILED if left_out or not made.collectors else OK)
    assert load(_written(render(made).encode()), {}) == structs.replace(made)


def _numeric(host: str, port: int, **options: Any) -> Any:
    """As getaddrinfo(3), for addresses as it reads them and for one name; nobody is asked."""
    if host == "collector.example":
        host = "192.0.2.7"
    options["flags"] = options.get("flags", 0) | socket.AI_NUMERICHOST
    return _getaddrinfo(host, port, **options)


_getaddrinfo: Final = socket.getaddrinfo


def samplicator(data: bytes) -> None:
    """A configuration of samplicator."""
    _import("samplicator", data)


def pmacct(data: bytes) -> None:
    """A file of pmacct's tee_receivers."""
    _import("pmacct", data)
