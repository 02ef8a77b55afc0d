"""Keeps the registry of clients, or as `-c` is the documented client that signs up and prints the list."""

import argparse
import signal
import sys
from collections.abc import Sequence

from services.gateway.documented_client import sign_up
from services.gateway.start import check_gateway, run_gateway
from shared.process.lifecycle import BAD_SETTINGS, OK, Lifecycle, OperatorError, run, service_parser
from shared.settings.explain import SettingsError
from shared.settings.file import load
from shared.settings.model import Settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the gateway or the client; return its exit code."""
    parser = service_parser("gateway", __doc__)
    parser.add_argument("-c", "--client", action="store_true", help="be the client: sign up, print the list, end")
    parser.add_argument("-n", "--name", default="name", help="the client's name (default: %(default)s)")
    options = parser.parse_args(arguments)
    return _be_client(options) if options.client else run(_serve, options, check_gateway)


def _be_client(options: argparse.Namespace) -> int:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        print(sign_up(options.name, load(options.config).gateway.endpoints))
    except SettingsError as error:
        print(error, file=sys.stderr)
        return BAD_SETTINGS
    except OperatorError as error:
        print(f"fanwire gateway: {error}", file=sys.stderr)
        return error.exit_code
    return OK


def _serve(_options: argparse.Namespace, settings: Settings, lifecycle: Lifecycle) -> None:
    run_gateway(settings, lifecycle)


if __name__ == "__main__":
    sys.exit(main())
