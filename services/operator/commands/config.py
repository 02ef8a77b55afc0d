"""`fanwire config`: the effective settings, file and environment taken together."""

import argparse
import os

from services.operator.cli.arguments import Subparsers, add_command
from shared.net.printable import printable
from shared.process.lifecycle import OK
from shared.settings.file import NOT_SETTINGS, render
from shared.settings.location import settings_file
from shared.settings.model import Settings


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    add_command(subparsers, "config", run, "print the effective settings as TOML")


def run(arguments: argparse.Namespace, settings: Settings) -> int:
    """Print the settings, and where they are from; the output can be read back as a settings file."""
    source = settings_file(arguments.config)
    print(printable(f"# read from {source}" if source else "# no settings file: the defaults"))
    names = (name for name in os.environ.keys() - NOT_SETTINGS if name.startswith("FANWIRE_") and "__" in name)
    for name in sorted(names):
        print(printable(f"# with {name}"))
    print(render(settings), end="")
    return OK
