"""The message by which the uplink tells of the nodes of a cluster: who lives, and how far their senders have got."""

from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from shared.bus.bodies.fields import Number
from shared.client import Place, Source

NODES_TOPIC: Final = "nodes/"
MAX_NODES: Final = 64
MAX_NODE_PLACES: Final = 1024
"""Workers of a node, each at each stream, whose place is told."""
MOST_PENDING: Final = 64
"""Messages of a node that may still be to come to another one that has caught up."""
NodeName = Annotated[str, Meta(min_length=1, max_length=32)]
Serving = Annotated[tuple[NodeName, ...], Meta(max_length=MAX_NODES)]
NodeState = Literal["joining", "live", "left", "silent"]
"""A node that is joining still gets what came before; one that has left ended in order; a silent one is not heard."""


class Node(msgspec.Struct, array_like=True, frozen=True):
    """A node as this host hears it: `age_ms` since its last beat; -1: none was heard.

    Of its datagrams `pending` messages are still to come here. Its `places` are those of its senders, by source,
    in what the workers of this bus have published. At `since_ns`, in ns since 1970, it has got no further for certain.
    `missed` grows whenever it tells that it has served without the node of this host. Those that are `serving` are the
    ones among which it shares collectors out.
    """

    name: NodeName
    state: NodeState
    age_ms: Annotated[int, Meta(ge=-1)] = -1
    pending: Number = 0
    since_ns: Number = 0
    places: dict[Source, Annotated[list[Place], Meta(max_length=MAX_NODE_PLACES)]] = {}
    missed: Number = 0
    serving: Serving = ()


class Nodes(msgspec.Struct, array_like=True, frozen=True):
    """The nodes of the cluster, that of this host first; `majority`: it hears most of them, or JetStream instead.

    Those that are `serving` are the ones among which collectors are shared out.
    """

    majority: bool
    nodes: Annotated[list[Node], Meta(min_length=1, max_length=MAX_NODES)]
    serving: Serving = ()

    @property
    def live(self) -> tuple[str, ...]:
        """The nodes that serve collectors, in order."""
        return tuple(sorted(node.name for node in self.nodes if node.state == "live"))
