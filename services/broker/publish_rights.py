"""The right to publish: each role has its own topics, under its own name. No I/O.

A subscriber trusts the kind of a message, so a kind on a topic of another family is refused here too.
"""

from typing import Final

from shared.bus.bodies.fields import REPLAY_PREFIX, REPLY_PREFIX
from shared.bus.bodies.journal_messages import JOURNAL_TOPIC, catch_up_topic
from shared.bus.bodies.nodes_message import NODES_TOPIC
from shared.bus.bodies.offload_messages import PATHS_TOPIC
from shared.bus.messages import (
    AGAIN_PREFIX,
    REGISTRY_TOPIC,
    TRANSMIT_TOPIC,
    Envelope,
    exporters_topic,
    health_topic,
    offload_topic,
    serve_topic,
    status_topic,
    topic_family,
)

TOPICS: Final[dict[str, frozenset[str]]] = {
    "broker": frozenset(),
    "gateway": frozenset({REGISTRY_TOPIC, TRANSMIT_TOPIC, serve_topic("relay"), serve_topic("original")}),
    "ingest": frozenset(),
    "forwarder": frozenset({health_topic("relay"), JOURNAL_TOPIC, catch_up_topic("relay")}),
    "transmitter": frozenset({health_topic("original"), JOURNAL_TOPIC, catch_up_topic("original")}),
    "journal": frozenset(),
    "offload": frozenset({offload_topic("relay"), offload_topic("original"), PATHS_TOPIC}),
    "console": frozenset(),
    "uplink": frozenset({JOURNAL_TOPIC, NODES_TOPIC}),
    "operator": frozenset({TRANSMIT_TOPIC}),
}
"""Whole topics; every role but `operator` also has the topic of its own status."""
FAMILIES: Final[dict[str, tuple[str, ...]]] = {
    "ingest": ("datagrams/", AGAIN_PREFIX + "{sender}/", "templates/", "renewals/"),
    "uplink": ("datagrams/", AGAIN_PREFIX + "{sender}/"),
    "forwarder": (REPLY_PREFIX,),
    "transmitter": (REPLY_PREFIX,),
    "journal": (REPLAY_PREFIX,),
}
"""Beginnings of topics to which one name is added: a stream's, a service's, or one that a request's sender chose."""


def refused_cause(role: str, topic: str, envelope: Envelope) -> str:
    """Return the cause under which a message of this role is refused; empty when the role may publish it."""
    if envelope.sender.partition(".")[0] != role:
        return "sender"
    if not _may_publish(role, topic, envelope.sender) or not topic.startswith(topic_family(envelope.kind)):
        return "topic"
    return ""


def _may_publish(role: str, topic: str, sender: str) -> bool:
    if topic in TOPICS.get(role, ()) or (topic == status_topic(sender) and role != "operator"):
        return True
    if role in ("ingest", "uplink") and topic == exporters_topic(sender):
        return True
    for family in FAMILIES.get(role, ()):
        prefix = family.format(sender=sender)
        name, slash, rest = topic.removeprefix(prefix).partition("/")
        if topic.startswith(prefix) and name and slash and not rest:
            return True
    return False
