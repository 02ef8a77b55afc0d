"""Command-line arguments that more than one command has."""

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, TypeVar

from services.operator.cli.numbers import parse_whole
from shared.bus.messages import MAX_INTERFACE
from shared.client import DEFAULT_TERMS, ListedClient
from shared.net.addresses import pack_address, pack_network
from shared.process.lifecycle import Parser, add_config_argument
from shared.settings.model import Settings

if TYPE_CHECKING:  # not subscriptable when the program runs
    Subparsers = argparse._SubParsersAction[Parser]
else:
    Subparsers = argparse._SubParsersAction

MAX_NUMBER: Final = 1e9

T = TypeVar("T")
Run = Callable[[argparse.Namespace, Settings], int]


def add_command(subparsers: Subparsers, name: str, run: Run, description: str) -> Parser:
    """Add a command that has `--config` and is run by `run`."""
    parser = subparsers.add_parser(name, help=description, description=description)
    add_config_argument(parser)
    parser.set_defaults(run=run, goes_by_defaults=False)
    return parser


def prefix(text: str) -> str:
    """Check a CIDR text: the type of an argument."""
    or_usage(pack_network, text)
    return text


def address(text: str) -> str:
    """Check an address: the type of an argument."""
    or_usage(pack_address, text)
    return text


def positive(text: str) -> int:
    """Parse a count from 1: the type of an argument."""
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, not {text!r}")
    return int(text)


def positive_number(text: str) -> float:
    """Parse a number above 0: the type of an argument. Nobody has a use for larger ones, which overflow timers."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number <= MAX_NUMBER:
        raise argparse.ArgumentTypeError(f"expected a number above 0, up to {MAX_NUMBER:g}, not {text!r}")
    return number


def whole(smallest: int, largest: int) -> Callable[[str], int]:
    """Return a parser of whole numbers from one to the other: the type of an argument."""
    return lambda text: or_usage(parse_whole, text, smallest, largest)


def interface_name(text: str) -> str:
    """Check that a text can be the name of a network interface: the type of an argument."""
    if not 1 <= len(or_usage(str.encode, text)) <= MAX_INTERFACE:
        raise argparse.ArgumentTypeError(f"expected an interface's name of at most {MAX_INTERFACE} bytes, not {text!r}")
    return text


def or_usage(parse: Callable[..., T], *arguments: Any) -> T:
    """Return the result of `parse`; turn its ValueError into a message for the user."""
    try:
        return parse(*arguments)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_wishes(parser: Parser) -> None:
    """Add the options for what a collector may ask of the registry; `wishes` makes fields of a request from them."""
    parser.add_argument("--port", type=int, metavar="PORT", help="UDP port the copies go to")
    parser.add_argument(
        "--address", type=address, metavar="ADDRESS", help="address for the copies; default: this end of the connection"
    )
    parser.add_argument(
        "--source", choices=("relay", "original"), help=f"source address of the copies; default: {DEFAULT_TERMS.source}"
    )
    parser.add_argument(
        "--from",
        dest="prefixes",
        type=prefix,
        action="append",
        metavar="CIDR",
        help="only datagrams of these exporters",
    )
    parser.add_argument("--sample", type=int, metavar="N", help="one datagram in N")
    parser.add_argument("--group", metavar="GROUP", help="share the streams with the group, by hash of source address")
    hop_limit, dscp = (f"default: {default}" for default in (DEFAULT_TERMS.hop_limit, DEFAULT_TERMS.dscp))
    parser.add_argument(
        "--hop-limit", type=whole(1, 255), metavar="N", help=f"hop limit of the copies (IPv4: TTL); {hop_limit}"
    )
    parser.add_argument("--dscp", type=whole(0, 63), metavar="N", help=f"DSCP of the copies; {dscp}")
    parser.add_argument(
        "--since",
        type=seconds_or_text,
        metavar="SINCE",
        help="first what the journal has since then: seconds ago, a time, or `left`: where this name has left",
    )


def wishes(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of a `register` request that were given; the registry knows the defaults."""
    fields = zip(ListedClient.__struct_encode_fields__, ListedClient.__struct_fields__, strict=True)
    wanted = [(key, field) for key, field in fields if field != "name"] + [("since", "since")]
    return {key: value for key, field in wanted if (value := getattr(arguments, field)) is not None}


def seconds_or_text(text: str) -> float | str:
    """Return a number of seconds, or what else was given: the registry knows what it may be."""
    try:
        return float(text)
    except ValueError:
        return text
