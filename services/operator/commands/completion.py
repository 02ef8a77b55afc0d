"""`fanwire completion`: a script by which a shell completes the commands and their options, from their own parsers."""

import argparse
from pathlib import Path
from typing import Final

from services.operator.cli.arguments import Subparsers, add_command
from services.operator.commands.ready import OPTIONAL, SERVICES
from shared.process.lifecycle import OK, add_service_arguments
from shared.settings.model import Settings

SHELLS: Final = ("bash", "zsh", "fish")


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = add_command(subparsers, "completion", run, "print a script that completes commands and options")
    parser.add_argument("shell", choices=SHELLS)


def run(arguments: argparse.Namespace, _settings: Settings) -> int:
    """Print the script for a shell."""
    import shtab

    from services.operator.__main__ import make_parser

    parser = make_parser()
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    for name in (*SERVICES, *OPTIONAL):
        add_service_arguments(commands.add_parser(name, help=f"run the {name}", description=""))
    for each in commands.choices.values():
        for action in each._actions:
            if action.type is Path:
                action.complete = shtab.FILE
    print(shtab.complete(parser, arguments.shell))
    return OK
