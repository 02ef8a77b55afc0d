"""`fanwire config`: the effective settings, file and environment together; or what services say of them."""

import argparse
import os
from pathlib import Path

from services.operator.cli.arguments import Subparsers, add_command
from services.operator.client.programs import refusals
from services.operator.commands.running.ready import OPTIONAL, SERVICES
from shared.net.printable import printable
from shared.process.lifecycle import BAD_SETTINGS, OK
from shared.settings.file import NOT_SETTINGS, render
from shared.settings.location import settings_file
from shared.settings.model import Settings
from shared.settings.opt_in import OPT_IN


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = add_command(subparsers, "config", run, "print the effective settings as TOML")
    parser.add_argument("--check", action="store_true", help="ask each service instead whether it could use them here")


def run(arguments: argparse.Namespace, settings: Settings) -> int:
    """Print the settings, and where they are from; the output can be read back as a settings file.

    With `--check`, print what each service would refuse, and return 78 if there is something.
    """
    source = settings_file(arguments.config)
    if arguments.check:
        return _check(arguments.config, str(source or "the defaults"))
    print(printable(f"# read from {source}" if source else "# no settings file: the defaults"))
    names = (name for name in os.environ.keys() - NOT_SETTINGS if name.startswith("FANWIRE_") and "__" in name)
    for name in sorted(names):
        print(printable(f"# with {name}"))
    print(render(settings), end="")
    return OK


def _check(config: Path | None, source: str) -> int:
    refused = refusals((*SERVICES, *OPT_IN, *OPTIONAL), config)
    for service, why in refused.items():
        print(printable(f"{service}: {why}"))
    if not refused:
        print(printable(f"no service refuses {source}"))
    return BAD_SETTINGS if refused else OK
