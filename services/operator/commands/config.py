"""`fanwire config`: the effective settings, file and environment taken together."""

import argparse

from services.operator.cli.arguments import Subparsers, add_command
from shared.process.lifecycle import OK
from shared.settings.file import render
from shared.settings.model import Settings


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    add_command(subparsers, "config", run, "print the effective settings as TOML")


def run(_arguments: argparse.Namespace, settings: Settings) -> int:
    """Print the settings; the output can be read back as a settings file."""
    print(render(settings), end="")
    return OK
