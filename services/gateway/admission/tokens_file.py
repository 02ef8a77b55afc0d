"""What the settings say about clients from elsewhere: their tokens, and TLS, without which no such listener starts."""

import os
import stat
import tomllib
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct, field

from shared.process.lifecycle import BAD_SETTINGS, OperatorError
from shared.settings.model import Settings, Token

MAX_TOKENS_FILE: Final = 16 * 1024 * 1024
"""Bytes: some 60,000 tokens; each `auth` compares with them all."""


class _TokensFile(Struct, frozen=True, forbid_unknown_fields=True):
    tokens: tuple[Token, ...] = field(default=(), name="token")


def read_tokens(settings: Settings) -> tuple[Token, ...]:
    """The tokens of the settings and of `[gateway] tokens`. OperatorError when the file can't be used."""
    if not settings.gateway.tokens:
        return settings.tokens
    path = _path(settings.gateway.tokens)
    try:
        found = msgspec.convert(tomllib.loads(_read_private(path)), _TokensFile).tokens
        settings.check_tokens(tokens := settings.tokens + found)
    except OSError as error:
        raise _bad(f"[gateway] tokens: {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # msgspec's and tomllib's are ValueErrors too
        raise _bad(f"[gateway] tokens: {path}: {error}") from None
    return tokens


def _read_private(path: Path) -> str:
    """Who may write to it could let itself in, and who may read it learns who may what.

    A file of root's may be readable by a group: systemd gives a service its credentials so.
    """
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        others = 0o077 if status.st_uid == os.geteuid() else 0o037
        if status.st_uid not in (0, os.geteuid()) or stat.S_IMODE(status.st_mode) & others:
            raise _bad(f"[gateway] tokens: {path}: others may use it; `chmod 600 {path}`, with us or root as its owner")
        return file.read(MAX_TOKENS_FILE).decode()


def _path(text: str) -> Path:
    return Path(os.path.expandvars(text))


def _bad(message: str) -> OperatorError:
    return OperatorError(BAD_SETTINGS, message)
