"""The nodes of a cluster as this host hears them, and who serves whom: by its uplink and its gateway."""

import time
from typing import Final, NamedTuple

from services.operator.client.bus_reader import subscribed
from shared.bus.bodies.nodes_message import NODES_TOPIC, Nodes
from shared.bus.messages import REGISTRY_TOPIC, RegistryChange, RegistrySnapshot
from shared.fanout.registry_replica import RegistryReplica
from shared.process.lifecycle import UNAVAILABLE, OperatorError
from shared.serving_nodes import Owners
from shared.settings.model import Settings

WAIT_SECONDS: Final = 3.0
"""Time for the uplink and the gateway to answer: the uplink tells of nodes each second."""
NOBODY: Final = ""


class KnownNodes(NamedTuple):
    """The nodes, that of this host first, and the collectors by the node that serves them, or by `NOBODY`."""

    told: Nodes
    served: dict[str, list[str]]

    @property
    def minority(self) -> str:
        """Return a sentence where this node does not hear most of the others; else nothing."""
        own = self.told.nodes[0].name
        sentence = f"{own} does not hear most of the nodes, nor JetStream: it does what [uplink] minority says"
        return "" if self.told.majority else sentence

    @property
    def not_served(self) -> list[str]:
        """Return the collectors that no node serves."""
        return self.served.get(NOBODY, [])


def heard_nodes(settings: Settings) -> KnownNodes:
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
    return KnownNodes(told, served)
