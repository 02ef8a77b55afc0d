"""`fanwire withhold` and `release`: an admin stops the copies to a collector, and lets them flow again."""

import argparse
import time
from shlex import quote

from services.operator.cli.arguments import Subparsers, add_command
from services.operator.cli.numbers import lasting
from services.operator.client.gateway_options import add_gateway_arguments, open_registry
from shared.client import MAX_REASON, Withheld
from shared.net.printable import printable
from shared.process.lifecycle import OK
from shared.settings.model import Settings


def add_parser(subparsers: Subparsers) -> None:
    """Add the two commands."""
    withhold = add_command(
        subparsers, "withhold", run_withhold, "stop the copies to a collector, which stays signed up"
    )
    release = add_command(subparsers, "release", run_release, "let the copies to a withheld collector flow again")
    for parser in (withhold, release):
        add_gateway_arguments(parser)
        parser.add_argument("name", metavar="CLIENT")
    withhold.add_argument(
        "--reason", default="", metavar="TEXT", help=f"shown wherever it is listed; at most {MAX_REASON} characters"
    )


def run_withhold(arguments: argparse.Namespace, settings: Settings) -> int:
    """Withhold the copies of a collector."""
    with open_registry(arguments, settings) as registry:
        registry.ask("withhold", name=arguments.name, reason=arguments.reason)
    name = arguments.name
    ends = f"`fanwire release {quote(name)}` ends that"
    print(printable(f"{name}: its copies are withheld, also when it signs up anew; {ends}"))
    return OK


def run_release(arguments: argparse.Namespace, settings: Settings) -> int:
    """Release the copies of a collector, or of a name that has left since."""
    with open_registry(arguments, settings) as registry:
        here = bytes(registry.ask("release", name=arguments.name).client) != b"null"
    flow = "its copies flow again" if here else "released; it is not signed up now"
    print(printable(f"{arguments.name}: {flow}"))
    return OK


def describe(name: str, order: Withheld, *, here: bool) -> str:
    """Return one line for an order to withhold copies."""
    who = f" by {order.by}" if order.by else ""
    why = f": {order.reason}" if order.reason else ""
    gone = "" if here else "; it is not signed up now"
    return f"{name} is withheld{who} for {lasting(max(0.0, time.time() - order.since))}{why}{gone}"
