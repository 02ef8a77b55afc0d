"""Shows streams, collectors, exporters and losses on a live page, and as metrics for Prometheus."""

import argparse
import select
import sys
from collections.abc import Sequence
from importlib.util import find_spec

from shared.log import get_logger
from shared.process.lifecycle import (
    MANAGER_SECONDS,
    Lifecycle,
    Manager,
    Watchdog,
    announce_ready,
    run,
    service_parser,
)
from shared.settings.model import Settings

NEEDED = ("starlette", "uvicorn", "prometheus_client")

log = get_logger()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the console; return its exit code."""
    return run(_serve, service_parser("console", __doc__).parse_args(arguments), _check)


def _check(settings: Settings) -> None:
    if not _missing():
        from services.console.server import check_console

        check_console(settings)


def _missing() -> list[str]:
    return [name for name in NEEDED if find_spec(name) is None]


def _serve(_arguments: argparse.Namespace, settings: Settings, lifecycle: Lifecycle) -> None:
    if missing := _missing():
        # It stays up, since honcho would end everything with it.
        log.warning("there is no page and there are no metrics: pip install 'fanwire[console]'", missing=missing)
        announce_ready("console.1", listen=[])
        watchdog, manager = Watchdog(), Manager()
        while not lifecycle.draining:
            watchdog.feed()
            select.select([lifecycle], [], [], MANAGER_SECONDS)
            lifecycle.heed()
            manager.check()
        return
    from services.console.server import run_console

    run_console(settings, lifecycle)


if __name__ == "__main__":
    sys.exit(main())
