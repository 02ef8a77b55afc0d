"""`fanwire token`: draws a token for a client from elsewhere, and prints the lines for the settings."""

import argparse
import hashlib
import json
import os
import secrets
import sys
from pathlib import Path
from typing import Final

import msgspec

from services.operator.cli.arguments import Subparsers, add_command, prefix
from services.operator.cli.output import say
from shared.process.lifecycle import CANT_CREATE, OK, USAGE, OperatorError
from shared.settings.entries import Token
from shared.settings.model import Settings
from shared.settings.values import SCOPES

TOKEN_BYTES: Final = 32
"""256 bits: a plain hash of it reveals nothing, see services/gateway/admission/rights.py."""


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = add_command(subparsers, "token", run, "make a token for a client on another host")
    parser.add_argument("name", metavar="NAME", help="the name of its holder")
    parser.add_argument(
        "--scope", dest="scopes", choices=SCOPES, action="append", required=True, help="may be repeated"
    )
    parser.add_argument(
        "--stream",
        dest="streams",
        action="append",
        metavar="STREAM",
        help="a stream it may sign up for; default: every stream",
    )
    parser.add_argument(
        "--destination",
        dest="destinations",
        type=prefix,
        action="append",
        metavar="CIDR",
        help="a network its copies may go to without proof; may be repeated; default: none",
    )
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the token to a new FILE; print the rest")


def run(arguments: argparse.Namespace, settings: Settings) -> int:
    """Print the token, which is kept nowhere, and the lines for the settings; or only those lines."""
    token = secrets.token_urlsafe(TOKEN_BYTES)
    entry = {
        "name": arguments.name,
        "hash": f"sha256:{hashlib.sha256(token.encode()).hexdigest()}",
        "scopes": list(dict.fromkeys(arguments.scopes)),
        "streams": arguments.streams,
        "destinations": arguments.destinations,
    }
    entry = {key: value for key, value in entry.items() if value is not None}
    try:
        settings.check_tokens([msgspec.convert(entry, Token)])
    except ValueError as error:
        raise OperatorError(USAGE, str(error)) from None
    if arguments.write is None:
        say("the token, for a file that only its holder can read; it is shown this once:")
        print(f"{token}\n")
        sys.stdout.flush()
        say("for the settings of the gateway:")
    else:
        _write(arguments.write, token)
    print("[[token]]", *(f"{key} = {json.dumps(value)}" for key, value in entry.items()), sep="\n")
    return OK


def _write(path: Path, token: str) -> None:
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:  # noqa: PTH123
            file.write(f"{token}\n")
    except OSError as error:
        raise OperatorError(CANT_CREATE, f"{path}: {error.strerror}; name a new file that this user can make") from None
