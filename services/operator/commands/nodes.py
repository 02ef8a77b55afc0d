"""`fanwire nodes`: the nodes of the cluster as this one hears them, and who serves whom."""

import argparse
import time
from collections.abc import Iterator
from typing import Final, NamedTuple

import msgspec

from services.operator.cli.arguments import Subparsers, add_command
from services.operator.cli.numbers import counted
from services.operator.cli.text_tables import Cell, print_table
from services.operator.client.bus_reader import subscribed
from shared.bus.bodies.nodes_message import NODES_TOPIC, Node, Nodes
from shared.bus.messages import REGISTRY_TOPIC, RegistryChange, RegistrySnapshot
from shared.fanout.registry_replica import RegistryReplica
from shared.net.printable import printable
from shared.owners import Owners
from shared.process.lifecycle import FAILED, OK, UNAVAILABLE, OperatorError
from shared.settings.model import Settings

WAIT_SECONDS: Final = 3.0
"""Time for the uplink and the gateway to answer: the uplink tells of nodes each second."""
COLUMNS: Final = ("node", "state", "heard", "behind", "serves", "collectors")
NAMED: Final = 5
"""Collectors of a node that are named."""
NOBODY: Final = ""


class _Known(NamedTuple):
    """The nodes as this host's uplink tells of them, and the collectors by the node that serves them."""

    nodes: Nodes
    served: dict[str, list[str]]


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
    known = _listen(settings)
    if arguments.json:
        print(msgspec.json.format(msgspec.json.encode(_facts(known)), indent=2).decode())
    else:
        _print(known)
    return OK if known.nodes.majority and not known.served.get(NOBODY) else FAILED


def _listen(settings: Settings) -> _Known:
    """Return what uplink and gateway tell. OperatorError (69) names the one that tells nothing."""
    owners, told = Owners.of(settings.uplink), None
    replica, until = RegistryReplica(), time.monotonic() + WAIT_SECONDS
    with subscribed(settings, NODES_TOPIC) as subscriber:
        subscriber.subscribe(REGISTRY_TOPIC)
        while (told is None or replica.revision < 0) and (left := until - time.monotonic()) > 0:
            subscriber.socket.poll(int(left * 1000) + 1)
            while message := subscriber.receive():
                if isinstance(message.body, Nodes):
                    told = message.body
                elif isinstance(message.body, RegistrySnapshot | RegistryChange):
                    replica.apply_message(message.envelope, message.body)
    if told is None or replica.revision < 0:
        silent = "uplink" if told is None else "gateway"
        raise OperatorError(UNAVAILABLE, f"the {silent} did not tell within {WAIT_SECONDS:g} s; does it run?")
    owners.note(told)
    served: dict[str, list[str]] = {}
    for name, client in sorted(replica.clients.items()):
        if client.streams:
            served.setdefault(owners.owner(client), []).append(name)
    return _Known(told, served)


def _facts(known: _Known) -> dict[str, object]:
    return {
        "node": known.nodes.nodes[0].name,
        "majority": known.nodes.majority,
        "nodes": [
            {
                "name": node.name,
                "state": node.state,
                "heard_seconds": None if node.age_ms < 0 else node.age_ms / 1000,
                "behind": node.pending,
                "collectors": known.served.get(node.name, []),
            }
            for node in known.nodes.nodes
        ],
        "not_served": known.served.get(NOBODY, []),
    }


def _print(known: _Known) -> None:
    own = known.nodes.nodes[0].name
    print_table(counted(len(known.nodes.nodes), "node"), COLUMNS, list(_rows(known)), ("serves",))
    if not known.nodes.majority:
        print(f"{own} does not hear most of the nodes, nor JetStream: it does what [uplink] minority says")
    if left := known.served.get(NOBODY):
        print(printable(f"not served: {_some(left)}"))


def _rows(known: _Known) -> Iterator[tuple[Cell, ...]]:
    for node in known.nodes.nodes:
        names = known.served.get(node.name, [])
        yield node.name, node.state, _heard(node), node.pending, len(names), _some(names)


def _heard(node: Node) -> str:
    return "never" if node.age_ms < 0 else f"{node.age_ms / 1000:.1f} s ago" if node.age_ms else "here"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{', '.join(names[:NAMED])}{more}"
