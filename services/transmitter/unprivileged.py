"""Runs the transmitter once the opener has given up every privilege: this is the process that reads the bus."""

import argparse
from collections.abc import Sequence

from services.transmitter.privileges import adopt, prove
from services.transmitter.service import TransmitterService
from shared.bus.endpoint import open_link
from shared.log import get_logger
from shared.process.lifecycle import Lifecycle, run, service_parser, worker_name
from shared.settings.model import Settings

log = get_logger()


def main(arguments: Sequence[str]) -> int:
    """Run the transmitter with the sockets it was handed; return its exit code."""
    parser = service_parser("transmitter", "Sends copies with the exporter's own address, and raw frames.")
    parser.add_argument(
        "--require-privilege", action="store_true", help="exit with 77 rather than go on without raw sockets"
    )
    parser.add_argument("--inherited", required=True, help=argparse.SUPPRESS)
    return run(_serve, parser.parse_args(arguments), _check)


def _check(settings: Settings) -> None:
    open_link(settings.bus, "transmitter")


def _serve(arguments: argparse.Namespace, settings: Settings, lifecycle: Lifecycle) -> None:
    sockets = adopt(arguments.inherited)
    facts = prove(sockets)
    if sockets.reason:
        log.warning(sockets.reason)
    with TransmitterService(worker_name("transmitter"), settings, sockets, facts) as service:
        service.run(lifecycle)
