"""TLS: the context of the connections, and the listeners that must have it."""

import os
import ssl
from collections.abc import Iterable
from pathlib import Path

from services.gateway.transport.listeners import Listener
from shared.process.lifecycle import BAD_SETTINGS, OperatorError
from shared.process.pem_files import load_authorities, load_certificate
from shared.settings.entries import Token
from shared.settings.tables import Gateway


def check_listener(listener: Listener, tokens: Iterable[Token]) -> None:
    """Raise OperatorError where a client from elsewhere could connect without a certificate or a token."""
    if not listener.remote:
        return
    at = f"[gateway] listen: {listener.endpoint} is not loopback"
    if not listener.secure:
        raise _unusable(f"{at}; use tls://, with a certificate and tokens, or listen on 127.0.0.1, [::1] or unix://")
    if not any(tokens):
        raise _unusable(
            f"{at}, and without a token no client could use it; add a [[token]], which `fanwire token` makes"
        )


def make_context(gateway: Gateway, tokens: Iterable[Token]) -> ssl.SSLContext:
    """Return the context of TLS connections. OperatorError when the files can't be used."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # No tickets: a resumed session would not show its certificate again, which may have expired meanwhile.
    context.num_tickets = 0
    context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_RENEGOTIATION
    if not (gateway.certificate and gateway.key):
        raise _unusable("[gateway] certificate and key: expected a PEM file each, for tls:// listeners")
    certificate, key, authorities = map(_path, (gateway.certificate, gateway.key, gateway.client_authorities))
    load_certificate(context, "[gateway]", certificate, key)
    by_certificate = [token.certificate is not None for token in tokens]
    if gateway.client_authorities:
        load_authorities(context, "[gateway] client_authorities", authorities)
        # A client that has a token needs no certificate; where none has a token, each needs one.
        context.verify_mode = ssl.CERT_REQUIRED if all(by_certificate) else ssl.CERT_OPTIONAL
    elif any(by_certificate):
        raise _unusable("[gateway] client_authorities: expected a PEM file, for each [[token]] that has a certificate")
    return context


def _path(text: str) -> Path:
    return Path(os.path.expandvars(text))


def _unusable(message: str) -> OperatorError:
    return OperatorError(BAD_SETTINGS, message)
