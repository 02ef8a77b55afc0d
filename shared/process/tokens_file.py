"""The tokens that the settings declare, and those of the file that `[gateway] tokens` names."""

import os
import stat
import tomllib
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct, field

from shared.process.lifecycle import BAD_SETTINGS, OperatorError
from shared.settings.entries import Token
from shared.settings.explain import explain, explain_toml
from shared.settings.model import Settings

MAX_TOKENS_FILE: Final = 16 * 1024 * 1024
"""Bytes: some 60,000 tokens; each `auth` compares with them all."""


class _TokensFile(Struct, frozen=True, forbid_unknown_fields=True):
    tokens: tuple[Token, ...] = field(default=(), name="token")


def read_tokens(settings: Settings) -> tuple[Token, ...]:
    """Return the tokens of the settings and of `[gateway] tokens`. OperatorError when the file can't be used."""
    if not settings.gateway.tokens:
        return settings.tokens
    path = Path(os.path.expandvars(settings.gateway.tokens))
    written, text = None, ""
    try:
        text = _read_private(path)
        written = tomllib.loads(text)
        found = msgspec.convert(written, _TokensFile).tokens
        settings.check_tokens(tokens := settings.tokens + found)
    except OSError as error:
        raise _unusable(path, f"{error.strerror}; name a file with lines that `fanwire token` prints") from None
    except msgspec.ValidationError as error:
        raise _unusable(path, explain(error, _TokensFile, written, text)) from None
    except (tomllib.TOMLDecodeError, UnicodeError, RecursionError) as error:
        raise _unusable(path, explain_toml(error)) from None
    except ValueError as error:
        raise _unusable(path, str(error)) from None
    return tokens


def _read_private(path: Path) -> str:
    """Read a file that other users can neither read, which would show the rights, nor write, which would let them in.

    A group may be able to read a file of root's: systemd gives a service its credentials this way.
    """
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        others = 0o077 if status.st_uid == os.geteuid() else 0o037
        if status.st_uid not in (0, os.geteuid()) or stat.S_IMODE(status.st_mode) & others:
            raise _unusable(
                path,
                "file is accessible to other users; make it mode 600, owned by root or this service's user: "
                f"`chmod 600 {path}`",
            )
        return file.read(MAX_TOKENS_FILE).decode()


def _unusable(path: Path, reason: str) -> OperatorError:
    return OperatorError(BAD_SETTINGS, f"[gateway] tokens: {path}: {reason}")
