"""The files that an operator writes or hands over: settings, tokens, keys, other replicators' receivers."""

import argparse
import io
import os
import re
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final
from unittest import mock

import zmq.utils.z85

from services.gateway.admission.tokens import Tokens
from services.gateway.protocol.requests import RequestError
from services.operator.importing import command as importing
from shared.bus.curve_keys import ROLES, load_keys, load_roles
from shared.capture.reader import CaptureError, CaptureReader
from shared.process.lifecycle import BAD_SETTINGS, FAILED, OK, OperatorError
from shared.process.tokens_file import read_tokens
from shared.settings.explain import SettingsError
from shared.settings.file import load, render
from shared.settings.model import Settings
from shared.settings.tables import Gateway
from tests.fuzz.corpus import split_parts
from tests.fuzz.printing import check_line, printed

MAX_KEYS: Final = 4
COMMENT: Final = {"samplicator": re.compile(r"\s*(#|$)"), "pmacct": re.compile(r"\s*([!#]|$)")}
"""Beginnings of lines that say nothing."""


@contextmanager
def _directory() -> Iterator[Path]:
    """A directory of ours that nobody else can enter."""
    with tempfile.TemporaryDirectory(prefix="fanwire-fuzz-") as directory:
        yield Path(directory)


def _load(directory: Path, text: str) -> Settings:
    path = directory / "settings.toml"
    path.write_text(text, "utf-8")
    return load(path, {})


def settings(data: bytes) -> None:
    """A settings file is read, and prints as one that is read to the same, or it is one line of SettingsError."""
    with _directory() as directory:
        path = directory / "fanwire.toml"
        path.write_bytes(data)
        try:
            found = load(path, {})
        except SettingsError as error:
            check_line(error)
            return
        assert _load(directory, render(found)) == found


def environment(data: bytes) -> None:
    """Variables, NAME=VALUE a line, override settings or are one line of SettingsError."""
    lines = [line.partition("=") for line in data.decode(errors="replace").splitlines()]
    try:
        load(None, {"FANWIRE_" + name: value for name, _, value in lines})
    except SettingsError as error:
        check_line(error)


def tokens(data: bytes) -> None:
    """A file of tokens gives those that it would give as settings, each to its holder, or it is one line."""
    with _directory() as directory:
        path = directory / "tokens.toml"
        path.write_bytes(data)
        path.chmod(0o600)
        try:
            found = read_tokens(Settings(gateway=Gateway(tokens=str(path))))
        except OperatorError as error:
            assert error.exit_code == BAD_SETTINGS
            check_line(error)
            return
        assert load(path, {}).tokens == found
    tokens = Tokens(found)
    for token in found:
        if token.certificate is not None:
            assert tokens.rights_of_certificate(token.certificate).holder == token.name
    try:
        tokens.rights_of_token(data.decode())
    except RequestError as refused:
        assert refused.error == "not_permitted"
    else:
        raise AssertionError("what is no token of theirs was taken for one")


def keys(data: bytes) -> None:
    """A directory of key files, each a name and its content, gives keys that are 32 bytes each, or it is one line."""
    found: list[bytes] = []
    with _directory() as directory:
        parts = split_parts(data, 2 * MAX_KEYS)
        for name, content in zip(parts[::2], parts[1::2], strict=False):
            path = directory / os.fsdecode(name.translate(None, b"/\0")[:200])
            if path.name not in ("", "..") and path != directory:
                path.write_bytes(content)
                path.chmod(0o600)
        for role in ROLES:
            try:
                loaded = load_keys(directory, role)
            except SettingsError as error:
                check_line(error)
                continue
            found += [loaded.secret, loaded.public, loaded.broker]
            assert loaded.secret.decode() not in f"{loaded!r} {loaded}"
        try:
            roles = load_roles(directory)
            assert set(roles.values()) <= set(ROLES)
            found += roles
        except SettingsError as error:
            check_line(error)
    for key in found:
        assert zmq.utils.z85.encode(zmq.utils.z85.decode(key)) == key


def _import(tool: str, data: bytes) -> None:
    """Import a receiver file whose first byte says how: settings that load, and of each line a receiver or a word."""
    source = "original" if data[:1] > b"\x7f" else "relay"
    with _directory() as directory:
        path = directory / "receivers"
        path.write_bytes(data[1:])
        arguments = argparse.Namespace(tool=tool, file=path, stream="s", listen=["udp://[::]:2000"], source=source)
        try:
            with mock.patch("shared.net.addresses.socket.getaddrinfo", _numeric), printed(escaped=False) as (out, err):
                code = importing.run(arguments, Settings())
        except SettingsError as error:
            check_line(error)
            assert ": line " in str(error)
            return
        made = _load(directory, out.getvalue())
        assert _load(directory, render(made)) == made
    assert [stream.name for stream in made.streams] == ["s"]
    assert {collector.source for collector in made.collectors} <= {source}
    words = err.getvalue().splitlines()
    said = [line.split(": ", 2) for line in words if line.startswith("line ")]
    unresolved = any(" has no address now: " in line for line in words)
    assert code == (FAILED if unresolved or any(line[1] == "left out" for line in said) or not made.collectors else OK)
    told = {line[0].removeprefix("line ") for line in said} | {each.name.split("-")[1] for each in made.collectors}
    lines = data[1:].decode(errors="backslashreplace").split("\n")
    assert told == {str(number) for number, line in enumerate(lines, 1) if not COMMENT[tool].match(line)}


def _numeric(host: str, port: int, **options: Any) -> Any:
    """Do as getaddrinfo(3) does, for addresses as it reads them and for one name; no server is asked."""
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


def capture(data: bytes) -> None:
    """A capture, of each format and byte order, gives datagrams and causes of skipped packets, or it is one line."""
    reader = CaptureReader(io.BytesIO(data))
    try:
        for each in reader:
            assert (len(each.source), len(each.destination)) == (16, 16)
            assert each.payload in data
    except CaptureError as error:
        check_line(error)
    for cause in reader.skipped:
        assert cause.isprintable()
