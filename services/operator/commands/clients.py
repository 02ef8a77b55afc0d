"""`fanwire clients`, `register` and `leave`: the registry, from a terminal."""

import argparse
from collections.abc import Mapping

import msgspec

from services.operator.cli.arguments import (
    Subparsers,
    add_command,
    add_wishes,
    wishes,
)
from services.operator.cli.numbers import counted, lasting
from services.operator.cli.text_tables import print_table
from services.operator.client.gateway_options import add_gateway_arguments, open_registry
from services.operator.client.offload_paths import heard_paths
from services.operator.client.running_streams import unknown_explained
from services.operator.commands.withhold import describe as describe_order
from shared.bus.bodies.offload_messages import CollectorPath
from shared.client import DEFAULT_TERMS
from shared.net.printable import printable
from shared.process.lifecycle import FAILED, OK, OperatorError
from shared.process.registry_client import Entry
from shared.settings.model import Settings

COLUMNS = (
    *("name", "address", "port", "streams", "source", "from", "sample", "group", "hop limit", "dscp"),
    *("expires", "health", "lost", "catching up"),
)

NOTHING = "receives nothing"
"""Of a client without streams, which may have been meant to be a collector."""


def add_parser(subparsers: Subparsers) -> None:
    """Add the three commands."""
    listing = add_command(subparsers, "clients", run_clients, "list the clients")
    listing.set_defaults(goes_by_defaults=True)  # it changes nothing, should another fanwire answer there
    register = add_command(subparsers, "register", run_register, "sign up a client, or a collector for streams")
    leave = add_command(subparsers, "leave", run_leave, "remove a client")
    for parser in (listing, register, leave):
        add_gateway_arguments(parser)
    for parser in (listing, register):
        parser.add_argument("--json", action="store_true", help="print the registry's answer as JSON")
    register.add_argument("name", metavar="NAME")
    leave.add_argument("name", metavar="CLIENT")
    register.add_argument(
        "--stream", dest="streams", action="append", metavar="STREAM", help="a stream to receive, or *; may be repeated"
    )
    add_wishes(register)
    register.add_argument("--ttl", type=float, metavar="SECONDS", help="leave by itself after this; default: never")
    register.add_argument("--take-over", action="store_true", help="replace a client of the same name")
    leave.add_argument("--generation", type=int, metavar="N", help="leave only as this generation")


def run_clients(arguments: argparse.Namespace, settings: Settings) -> int:
    """Print the registry."""
    with open_registry(arguments, settings) as registry:
        answer = registry.ask("list")
    paths = {} if arguments.gateway else heard_paths(settings)  # those of another gateway are others
    if arguments.json:
        _print_json(_with_paths(answer.clients, paths) if paths else answer.clients)
    else:
        entries = answer.entries()
        columns = (*COLUMNS, "path") if paths else COLUMNS
        rows = (_row(entry) + ((_path(paths.get(name)),) if paths else ()) for name, entry in entries.items())
        print_table(counted(len(entries), "client"), columns, rows)
        for name, order in answer.withheld.items():
            print(printable(describe_order(name, order, here=name in entries)))
    return OK


def _row(entry: Entry) -> tuple[str | int | None, ...]:
    wishes = (
        ", ".join(entry.streams),
        entry.source,
        ", ".join(entry.prefixes),
        entry.sample if entry.sample > 1 else None,
        entry.group,
        entry.hop_limit if entry.hop_limit != DEFAULT_TERMS.hop_limit else None,
        entry.dscp or None,
    )
    ends = (_expires(entry), _health(entry), entry.lost if entry.streams else None, _behind(entry))
    address = f"{entry.address} ({entry.host})" if entry.host else entry.address
    return (entry.name, address, entry.port, *(wishes if entry.streams else [None] * len(wishes)), *ends)


def _path(path: CollectorPath | None) -> str | None:
    """Return the way of a collector's copies, and the reason why it is not the kernel."""
    if path is None:
        return None
    return f"{path.way}: {path.reason}" if path.reason else path.way


def _with_paths(clients: msgspec.Raw, paths: Mapping[str, CollectorPath]) -> msgspec.Raw:
    """Return the registry's answer with the way of each collector's copies in its entry."""
    found: dict[str, dict[str, object]] = msgspec.json.decode(bytes(clients))
    for name, entry in found.items():
        if path := paths.get(name):
            entry |= {"path": path.way, "path_reason": path.reason}
    return msgspec.Raw(msgspec.json.encode(found))


def _expires(entry: Entry) -> str | None:
    return f"in {entry.expires_in:.0f} s" if entry.expires_in else None


def _health(entry: Entry) -> str | None:
    """Return the word, and its duration."""
    if not entry.streams:
        return NOTHING
    lasts = f" for {lasting(entry.health_since)}" if entry.health and entry.health_since is not None else ""
    return f"{entry.health}{lasts}" if entry.health else None


def _behind(entry: Entry) -> str | None:
    """Return how far a collector that is being given the past is behind, and when it will be level."""
    if (progress := entry.catching_up) is None:
        return None
    level = "" if progress.level_in is None else f", level again in {lasting(progress.level_in)}"
    return f"{progress.rows} datagrams, {lasting(progress.seconds)} behind{level}"


def run_register(arguments: argparse.Namespace, settings: Settings) -> int:
    """Sign up a client; print what was granted."""
    request = {"name": arguments.name, **wishes(arguments)}
    if arguments.ttl is not None:
        request["ttl"] = arguments.ttl
    if arguments.take_over:
        request["take_over"] = True
    with open_registry(arguments, settings) as registry, unknown_explained(settings):
        answer = registry.ask("register", **request)
    if arguments.json:
        _print_json(answer.client)
    else:
        print(printable(describe(answer.entry())))
        if arguments.since is not None and answer.message:
            print(printable(answer.message))
    return OK


def describe(entry: Entry) -> str:
    """Return one line for what was granted."""
    lease = f"generation {entry.generation}, expires {_expires(entry) or 'never'}"
    line = f"{entry.name}: on the list as {entry.address} port {entry.port}, but {NOTHING}; name --stream and --port"
    if entry.streams:
        line = f"{entry.name}: copies of {', '.join(entry.streams)} go to {entry.address} port {entry.port}"
        line += f", source {entry.source}"
        line += f", from {', '.join(entry.prefixes)}" if entry.prefixes else ""
        line += f", 1 in {entry.sample}" if entry.sample > 1 else ""
        line += f", shared by group {entry.group}" if entry.group else ""
        line += f", hop limit {entry.hop_limit}" if entry.hop_limit != DEFAULT_TERMS.hop_limit else ""
        line += f", DSCP {entry.dscp}" if entry.dscp else ""
        lease += f", health {entry.health}"
    return f"{line}; {lease}"


def run_leave(arguments: argparse.Namespace, settings: Settings) -> int:
    """Remove a client, of any generation unless one is given."""
    with open_registry(arguments, settings) as registry:
        generation = arguments.generation
        if generation is None:
            entry = registry.ask("list").entries().get(arguments.name)
            if entry is None:
                raise OperatorError(FAILED, f"{arguments.name} is not registered; `fanwire clients` lists the clients")
            generation = entry.generation
        registry.ask("leave", name=arguments.name, generation=generation)
    print(printable(f"{arguments.name} has left"))
    return OK


def _print_json(value: msgspec.Raw) -> None:
    print(msgspec.json.format(bytes(value), indent=4).decode())
