"""The nodes of a cluster, as this host's uplink tells of them, and how many collectors each serves. No I/O."""

from collections import Counter
from collections.abc import Iterable, Mapping

from shared.bus.bodies.nodes_message import Nodes
from shared.client import Client
from shared.serving_nodes import Owners


class Cluster:
    """The nodes as they were told last; None until then, as on a host that is no node."""

    def __init__(self) -> None:
        self.nodes: Nodes | None = None
        self._owners = Owners()

    def note(self, body: Nodes) -> None:
        """Take a message in."""
        if self.nodes is None:
            self._owners = Owners(body.nodes[0].name, [node.name for node in body.nodes])
        self.nodes = body
        self._owners.note(body)

    def is_elsewhere(self, client: Client) -> bool:
        """Return whether another node serves a collector."""
        return self._owners.owner(client) not in (self._owners.own, "")

    def served(self, collectors: Iterable[Client]) -> Mapping[str, int]:
        """Return the number of collectors by the node that serves them; "": nobody does."""
        return Counter(self._owners.owner(client) for client in collectors) if self.nodes else {}
