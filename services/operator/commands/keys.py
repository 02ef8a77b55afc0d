"""`fanwire keys`: makes the keys by which processes prove their role on the bus."""

import argparse
from pathlib import Path
from typing import Final

from services.operator.cli.arguments import Subparsers, add_command
from shared.bus.curve_keys import ROLES, write_keys
from shared.process.lifecycle import CANT_CREATE, OK, OperatorError
from shared.settings.explain import did_you_mean
from shared.settings.model import Settings

DIRECTORY_MODE: Final = 0o755
"""Public keys are for everybody; a secret has its own, closed mode."""


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = add_command(subparsers, "keys", run, "make the keys of [bus] keys")
    parser.add_argument("directory", type=Path, metavar="DIRECTORY", help="created if it does not exist")
    parser.add_argument("roles", nargs="*", type=_role, metavar="ROLE", help=f"default: {' '.join(ROLES)}")


def _role(text: str) -> str:
    if text not in ROLES:
        raise argparse.ArgumentTypeError(f"no {text!r}{did_you_mean(text, ROLES)}; expected one of: {', '.join(ROLES)}")
    return text


def run(arguments: argparse.Namespace, _settings: Settings) -> int:
    """Make a pair a role, and print its files; OperatorError (73) when one exists, or can't be made."""
    try:
        arguments.directory.mkdir(DIRECTORY_MODE, parents=True, exist_ok=True)
        for secret, public in write_keys(arguments.directory, dict.fromkeys(arguments.roles or ROLES)):
            print(f"{secret}  {public}")
    except FileExistsError as error:
        raise OperatorError(
            CANT_CREATE, f"{error.filename} exists, and keys are never replaced: move it away, or name other roles"
        ) from None
    except OSError as error:
        raise OperatorError(
            CANT_CREATE, f"{error.filename}: {error.strerror}; name a directory that this user can write"
        ) from None
    print("each service needs its own .secret and broker.public; the broker every .public")
    return OK
