"""Keeps the registry of clients, or as `-c` is the documented client that signs up and prints the list."""

import argparse
import signal
import sys
from collections.abc import Sequence

from services.gateway.documented_client import sign_up
from services.gateway.server import check_gateway, run_gateway
from shared.process.lifecycle import Lifecycle, run, service_parser
from shared.settings.model import Settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the gateway or the client; return its exit code."""
    parser = service_parser("gateway", __doc__)
    parser.add_argument("-c", "--client", action="store_true", help="be the client: sign up, print the list, end")
    parser.add_argument("-n", "--name", default="name", help="the client's name (default: %(default)s)")
    return run(_main, parser.parse_args(arguments), check_gateway)


def _main(arguments: argparse.Namespace, settings: Settings, lifecycle: Lifecycle) -> None:
    if not arguments.client:
        run_gateway(settings, lifecycle)
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the client has nothing to drain
    print(sign_up(arguments.name, settings.gateway.endpoints))


if __name__ == "__main__":
    sys.exit(main())
