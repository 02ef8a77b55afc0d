"""What the settings say about clients from elsewhere: their tokens, and TLS, without which no such listener starts."""

import contextlib
import os
import ssl
import stat
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct, field

from services.gateway.listeners import Listener
from shared.lifecycle import BAD_SETTINGS, OperatorError
from shared.settings import Gateway, Settings, Token

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


def check_listener(listener: Listener, tokens: Iterable[Token]) -> None:
    """Raise OperatorError where somebody from elsewhere could come in without saying who it is."""
    if not listener.remote:
        return
    at = f"[gateway] listen: {listener.endpoint} is not loopback"
    if not listener.secure:
        raise _bad(f"{at}; use tls://, with a certificate and tokens, or listen on 127.0.0.1, [::1] or unix://")
    if not any(tokens):
        raise _bad(f"{at}, and nobody could use it; add a [[token]], which `fanwire token` makes")


def make_context(gateway: Gateway, tokens: Iterable[Token]) -> ssl.SSLContext:
    """What TLS connections are made with. OperatorError when the files can't be used."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # No tickets: a session that goes on would not show its certificate again, which may have expired meanwhile.
    context.num_tickets = 0
    context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_RENEGOTIATION
    if not (gateway.certificate and gateway.key):
        raise _bad("[gateway] certificate and key: expected a PEM file each, for tls:// listeners")
    certificate, key, authorities = map(_path, (gateway.certificate, gateway.key, gateway.client_authorities))
    with _loading("certificate and key", certificate, key):
        context.load_cert_chain(certificate, key, password=str)  # an empty one: OpenSSL would ask the terminal
    by_certificate = [token.certificate is not None for token in tokens]
    if gateway.client_authorities:
        with _loading("client_authorities", authorities):
            context.load_verify_locations(authorities)
        # Who has a token may come without a certificate; where nobody has, it would be of no use.
        context.verify_mode = ssl.CERT_REQUIRED if all(by_certificate) else ssl.CERT_OPTIONAL
    elif any(by_certificate):
        raise _bad("[gateway] client_authorities: expected a PEM file, for each [[token]] that has a certificate")
    return context


@contextlib.contextmanager
def _loading(what: str, *paths: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:  # OpenSSL's are OSErrors too, and it names no file
        reason = error.reason if isinstance(error, ssl.SSLError) and error.reason else error.strerror
        raise _bad(f"[gateway] {what}: {', '.join(map(str, paths))}: {reason}; expected PEM, unencrypted") from None


def _path(text: str) -> Path:
    return Path(os.path.expandvars(text))


def _bad(message: str) -> OperatorError:
    return OperatorError(BAD_SETTINGS, message)
