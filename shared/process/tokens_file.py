"""The tokens that the settings declare, and those of the file that `[gateway] tokens` names."""

import os
import tomllib
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct, field

from shared.process.lifecycle import BAD_SETTINGS, OperatorError
from shared.process.private_file import read_private
from shared.settings.entries import Token
from shared.settings.explain import explain, explain_toml
from shared.settings.model import Settings

SETTING: Final = "[gateway] tokens"
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
        text = read_private(path, SETTING, MAX_TOKENS_FILE).decode()
        written = tomllib.loads(f"{text}\n")  # the last line has a number only if it ends
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


def _unusable(path: Path, reason: str) -> OperatorError:
    return OperatorError(BAD_SETTINGS, f"{SETTING}: {path}: {reason}")
