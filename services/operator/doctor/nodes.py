"""The nodes of a cluster: whether this one hears them, and whether every collector is served. No I/O."""

from collections.abc import Iterator
from typing import Final

from services.operator.client.cluster import KnownNodes
from shared.bus.bodies.nodes_message import Node
from shared.monitoring.finding import Finding, error, ok, some, warning

NAME: Final = "nodes"


def check_nodes(known: KnownNodes | str) -> Iterator[Finding]:
    """Yield every finding about them; in place of the nodes there may be the reason for which they are not known."""
    if isinstance(known, str):
        yield error(NAME, f"it is not known which nodes live: {known}", "see services, and the uplink's log")
        return
    if known.minority:
        cure = "see the network between the nodes, and whether most of the NATS servers run"
        yield error(NAME, known.minority, cure)
    if known.not_served:
        yield error(NAME, f"nobody serves {some(known.not_served)}", "see `fanwire nodes`")
    for node in known.told.nodes:
        yield _check(node)


def _check(node: Node) -> Finding:
    if node.state == "silent":
        since = "since this one has started" if node.age_ms < 0 else f"for {node.age_ms / 1000:.1f} s"
        cure = (
            "see whether it runs, and the network; if it is gone for good, take it out of [uplink] nodes on each node"
        )
        return warning(NAME, f"not heard {since}", cure, node.name)
    said = {
        "joining": "it gets what came before, and serves nobody yet",
        "left": "it has ended in order",
        "live": "it lives, and serves collectors",
    }
    return ok(NAME, said[node.state], node.name)
