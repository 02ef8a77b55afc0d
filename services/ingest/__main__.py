"""Takes datagrams in and puts them on the bus."""

import argparse
import sys
from collections.abc import Sequence

from services.ingest.listeners import check_listeners
from services.ingest.worker import Worker
from shared.process.lifecycle import Lifecycle, run, service_parser, worker_name
from shared.settings.model import Settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Run an ingest worker; return its exit code."""
    return run(_serve, service_parser("ingest", __doc__).parse_args(arguments), check_listeners)


def _serve(_arguments: argparse.Namespace, settings: Settings, lifecycle: Lifecycle) -> None:
    with Worker(worker_name("ingest"), settings) as worker:
        worker.run(lifecycle)


if __name__ == "__main__":
    sys.exit(main())
