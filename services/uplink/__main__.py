"""Exchanges streams with other sites by NATS JetStream; without `[uplink] servers` it does nothing."""

import argparse
import sys
from collections.abc import Sequence

from shared.nats.installed import check_installed
from shared.process.lifecycle import Lifecycle, run, service_parser, stay_up, worker_name
from shared.settings.model import Settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the uplink; return its exit code."""
    return run(_serve, service_parser("uplink", __doc__).parse_args(arguments), _check)


def _check(settings: Settings) -> None:
    if settings.uplink.servers:
        check_installed(settings.uplink)
        from shared.nats.access import check_access

        check_access(settings.uplink)


def _serve(_arguments: argparse.Namespace, settings: Settings, lifecycle: Lifecycle) -> None:
    name = worker_name("uplink")
    if not settings.uplink.servers:
        stay_up(name, lifecycle)
        return
    _check(settings)
    from services.uplink.service import Service

    with Service(name, settings) as service:
        service.run(lifecycle)


if __name__ == "__main__":
    sys.exit(main())
