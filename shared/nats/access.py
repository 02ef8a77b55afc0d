"""Access to the NATS servers: the TLS context, and who this site is, read anew for each connection."""

import ssl
from pathlib import Path
from typing import Any, Final

import nkeys
from nats.aio.client import RawCredentials

from shared.process.lifecycle import BAD_SETTINGS, OperatorError
from shared.process.pem_files import load_authorities, load_certificate
from shared.process.private_file import read_private
from shared.settings.uplink import Uplink, expanded

MAX_SECRET: Final = 65_536
"""Bytes of a file of credentials: a JWT of some kilobytes, and a seed."""


def check_access(uplink: Uplink) -> None:
    """Raise OperatorError where a file can't be used."""
    credentials(uplink)
    tls_context(uplink)


def credentials(uplink: Uplink) -> dict[str, Any]:
    """Return how this site proves itself, as arguments of nats-py's `connect`. OperatorError."""
    for setting, path in (("credentials", expanded(uplink.credentials)), ("nkey", expanded(uplink.nkey))):
        if path is None:
            continue
        try:
            text = read_private(path, f"[uplink] {setting}", MAX_SECRET).decode()
            seed = _seed_in(text)
            nkeys.from_seed(bytearray(seed.encode())).wipe()
        except OperatorError:
            raise
        except OSError as error:
            raise _unusable(setting, path, f"{error.strerror}") from None
        except Exception:  # nkeys has many errors; none of their texts may show what is in the file
            raise _unusable(setting, path, "no seed of a user's nkey in it, a line that begins with SU") from None
        return {"nkeys_seed_str": seed} if setting == "nkey" else {"user_credentials": RawCredentials(text)}
    return {}


def _seed_in(text: str) -> str:
    return next(line for line in map(str.strip, text.splitlines()) if line.startswith("SU"))


def tls_context(uplink: Uplink) -> ssl.SSLContext:
    """Return the context of connections by TLS. OperatorError when its files can't be used."""
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    authority, certificate, key = map(expanded, (uplink.authority, uplink.certificate, uplink.key))
    if authority:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # checks names, and trusts nobody else
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        load_authorities(context, "[uplink] authority", authority)
    if certificate and key:
        try:
            read_private(key, "[uplink] key", MAX_SECRET)
        except OSError as error:
            raise _unusable("key", key, f"{error.strerror}; expected PEM, unencrypted") from None
        load_certificate(context, "[uplink]", certificate, key)
    return context


def _unusable(setting: str, path: Path, reason: str) -> OperatorError:
    return OperatorError(BAD_SETTINGS, f"[uplink] {setting}: {path}: {reason}")
