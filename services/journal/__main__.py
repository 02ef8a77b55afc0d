"""Keeps the datagrams of streams on disk, for collectors that were away and for people."""

import argparse
import os
import sys
from collections.abc import Sequence

from services.journal.idle import wait_for_streams
from shared.bus.endpoint import has_key, open_link
from shared.process.lifecycle import CANT_CREATE, Lifecycle, OperatorError, run, service_parser, stay_up, worker_name
from shared.settings.model import Settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the journal; return its exit code."""
    return run(_serve, service_parser("journal", __doc__).parse_args(arguments), _check)


def _check(settings: Settings) -> None:
    if settings.journaled:
        open_link(settings.bus, "journal")
        there = settings.journal.path
        while not there.exists():
            there = there.parent
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            cure = "set [journal] directory to one of this user's"
            raise OperatorError(CANT_CREATE, f"{settings.journal.path}: no files can be made there; {cure}")


def _serve(_arguments: argparse.Namespace, settings: Settings, lifecycle: Lifecycle) -> None:
    name = worker_name("journal")
    if not (settings.journaled or has_key(settings.bus, "journal")):
        stay_up(name, lifecycle)  # keys that an earlier release has made have none for it
        return
    if not settings.journaled:
        settings = wait_for_streams(name, settings, lifecycle)
    if not lifecycle.draining:
        from services.journal.service import JournalService  # numpy is for those who keep something

        with JournalService(name, settings) as service:
            service.run(lifecycle)


if __name__ == "__main__":
    sys.exit(main())
