"""Sends each collector its copies, from this host's own address."""

import argparse
import sys
from collections.abc import Sequence

from services.forwarder.service import ForwarderService
from shared.bus.endpoint import open_link
from shared.process.lifecycle import Lifecycle, run, service_parser, worker_name
from shared.settings.model import Settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the forwarder; return its exit code."""
    return run(_serve, service_parser("forwarder", __doc__).parse_args(arguments), _check)


def _check(settings: Settings) -> None:
    open_link(settings.bus, "forwarder")


def _serve(_arguments: argparse.Namespace, settings: Settings, lifecycle: Lifecycle) -> None:
    with ForwarderService(worker_name("forwarder"), settings) as service:
        service.run(lifecycle)


if __name__ == "__main__":
    sys.exit(main())
