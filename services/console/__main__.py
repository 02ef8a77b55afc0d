"""Shows streams, collectors, exporters and losses on a live page, and as metrics for Prometheus."""

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec

from shared.log import get_logger
from shared.process.lifecycle import Lifecycle, run, service_parser, stay_up
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
        log.warning("there is no page and there are no metrics: pip install 'fanwire[console]'", missing=missing)
        stay_up("console.1", lifecycle)
        return
    from services.console.server import run_console

    run_console(settings, lifecycle)


if __name__ == "__main__":
    sys.exit(main())
