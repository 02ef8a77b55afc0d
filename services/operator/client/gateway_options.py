"""A command's way to the gateway: its address, and the credentials to show there when it is on another host."""

import argparse
import ssl
from pathlib import Path

from services.operator.cli.arguments import or_usage
from shared.net.addresses import Endpoint, parse_endpoint
from shared.process.lifecycle import USAGE, OperatorError
from shared.process.registry_client import Access, RegistryClient
from shared.settings.model import Settings
from shared.settings.tables import REGISTRY_SCHEMES


def add_gateway_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--gateway ENDPOINT` and the options of TLS; a token is never an argument, others could read it."""
    parser.add_argument(
        "--gateway",
        type=_gateway,
        metavar="ENDPOINT",
        help="tcp://HOST:PORT, unix:///PATH or tls://HOST:PORT; default: as in settings",
    )
    parser.add_argument("--token-file", type=Path, metavar="FILE", help="holds the token to show to the gateway")
    parser.add_argument(
        "--authority", type=Path, metavar="FILE", help="the authority that signed the gateway's certificate, PEM"
    )
    parser.add_argument("--certificate", type=Path, metavar="FILE", help="the certificate to show to the gateway, PEM")
    parser.add_argument("--key", type=Path, metavar="FILE", help="the key of --certificate, if it is in another file")


def _gateway(text: str) -> Endpoint:
    return or_usage(parse_endpoint, text, REGISTRY_SCHEMES)


def access(arguments: argparse.Namespace, settings: Settings) -> Access:
    """Return the gateway of `--gateway`, else the nearest of the settings, and the credentials for it."""
    by_nearness = sorted(settings.gateway.endpoints, key=lambda endpoint: endpoint.scheme == "tls")
    endpoint = arguments.gateway or by_nearness[0]
    token = _read_token(arguments.token_file) if arguments.token_file else None
    if endpoint.scheme == "tls":
        return Access(endpoint, _context(arguments), token)
    if arguments.authority or arguments.certificate:
        raise OperatorError(USAGE, f"--authority and --certificate are for tls://HOST:PORT, not for {endpoint}")
    return Access(endpoint, token=token)


def _read_token(path: Path) -> str:
    try:
        return path.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise OperatorError(USAGE, f"--token-file {path}: {getattr(error, 'strerror', None) or error}") from None


def _context(arguments: argparse.Namespace) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=arguments.authority)
        if arguments.certificate:
            context.load_cert_chain(arguments.certificate, arguments.key)
    except OSError as error:  # errors of OpenSSL are OSErrors too, and name no file
        files = ", ".join(str(path) for path in (arguments.authority, arguments.certificate, arguments.key) if path)
        raise OperatorError(USAGE, f"{files}: {error.strerror or error}; expected PEM files") from None
    return context


def open_registry(arguments: argparse.Namespace, settings: Settings) -> RegistryClient:
    """Connect to the gateway of `--gateway`, else of the settings."""
    return RegistryClient(access(arguments, settings), 10.0 + settings.gateway.serve_seconds)
