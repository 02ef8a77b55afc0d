"""`fanwire nodes`: the nodes of the cluster as this one hears them, and who serves whom."""

import argparse
from collections.abc import Iterator
from typing import Final

import msgspec

from services.operator.cli.arguments import Subparsers, add_command
from services.operator.cli.numbers import counted
from services.operator.cli.text_tables import Cell, print_table
from services.operator.client.cluster import KnownNodes, heard_nodes
from shared.bus.bodies.nodes_message import Node
from shared.net.printable import printable
from shared.process.lifecycle import FAILED, OK, UNAVAILABLE, OperatorError
from shared.settings.model import Settings

COLUMNS: Final = ("node", "state", "heard", "behind", "serves", "collectors")
NAMED: Final = 5
"""Collectors of a node that are named."""


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = add_command(
        subparsers, "nodes", run, "the nodes of the cluster, and who serves whom (exit 1 if somebody is not served)"
    )
    parser.add_argument("--json", action="store_true", help="print them as JSON")


def run(arguments: argparse.Namespace, settings: Settings) -> int:
    """Print the nodes; return 0 where this one hears most of them, and every collector is served."""
    if not settings.uplink.nodes:
        raise OperatorError(UNAVAILABLE, "this host is no node of a cluster: [uplink] nodes is empty")
    known = heard_nodes(settings)
    if arguments.json:
        print(msgspec.json.format(msgspec.json.encode(_facts(known)), indent=2).decode())
    else:
        _print(known)
    return OK if known.told.majority and not known.not_served else FAILED


def _facts(known: KnownNodes) -> dict[str, object]:
    return {
        "node": known.told.nodes[0].name,
        "majority": known.told.majority,
        "nodes": [
            {
                "name": node.name,
                "state": node.state,
                "heard_seconds": None if node.age_ms < 0 else node.age_ms / 1000,
                "behind": node.pending,
                "collectors": known.served.get(node.name, []),
            }
            for node in known.told.nodes
        ],
        "not_served": known.not_served,
    }


def _print(known: KnownNodes) -> None:
    print_table(counted(len(known.told.nodes), "node"), COLUMNS, list(_rows(known)), ("serves",))
    if known.minority:
        print(known.minority)
    if left := known.not_served:
        print(printable(f"not served: {_some(left)}"))


def _rows(known: KnownNodes) -> Iterator[tuple[Cell, ...]]:
    for node in known.told.nodes:
        names = known.served.get(node.name, [])
        yield node.name, node.state, _heard(node), node.pending, len(names), _some(names)


def _heard(node: Node) -> str:
    return "never" if node.age_ms < 0 else f"{node.age_ms / 1000:.1f} s ago" if node.age_ms else "here"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{', '.join(names[:NAMED])}{more}"
