"""Certificates, their keys, and authorities, in files. Errors of OpenSSL name no file: here they do."""

import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shared.process.lifecycle import BAD_SETTINGS, OperatorError


def load_certificate(context: ssl.SSLContext, section: str, certificate: Path, key: Path) -> None:
    """Load the certificate and key of a section such as `[gateway]`. OperatorError when they can't be used."""
    with _explained(f"{section} certificate and key", certificate, key):
        context.load_cert_chain(certificate, key, password=str)  # no password: OpenSSL must not ask the terminal


def load_authorities(context: ssl.SSLContext, setting: str, path: Path) -> None:
    """Load the authorities whose certificates are believed. OperatorError when they can't be used."""
    with _explained(setting, path):
        context.load_verify_locations(path)


@contextmanager
def _explained(setting: str, *paths: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:  # errors of OpenSSL are OSErrors too
        reason = error.reason if isinstance(error, ssl.SSLError) and error.reason else error.strerror
        said = f"{setting}: {', '.join(map(str, paths))}: {reason}; expected PEM, unencrypted"
        raise OperatorError(BAD_SETTINGS, said) from None
