from services.operator.client.cluster import KnownNodes
from services.operator.doctor.nodes import check_nodes
from shared.bus.bodies.nodes_message import Node, Nodes

STATES = [Node("a", "live", 0), Node("b", "silent", 7500), Node("c", "silent"), Node("d", "left"), Node("e", "joining")]

SILENT = "see whether it runs, and the network; if it is gone for good, take it out of [uplink] nodes on each node"
CURES = (
    "see the network between the nodes, and whether most of the NATS servers run",
    "see `fanwire nodes`",
    "see services, and the uplink's log",
)


def findings(known: KnownNodes | str) -> list[tuple[str, str, str]]:
    """Level, subject and sentence of each finding; what is not fine has a cure, and a silent node one of its own."""
    found = list(check_nodes(known))
    for each in found:
        cures = CURES if each.level == "error" else [SILENT] if each.level == "warning" else [""]
        assert each.cure in cures
    return [(each.level, each.subject, each.why) for each in found]


def test_each_node_is_a_finding() -> None:
    """One that is not heard is a warning with the time; others tell what they do."""
    assert findings(KnownNodes(Nodes(True, STATES, ("a",)), {"a": ["siem"]})) == [
        ("ok", "a", "it lives, and serves collectors"),
        ("warning", "b", "not heard for 7.5 s"),
        ("warning", "c", "not heard since this one has started"),
        ("ok", "d", "it has ended in order"),
        ("ok", "e", "it gets what came before, and serves nobody yet"),
    ]


def test_a_minority_and_who_is_not_served_are_errors() -> None:
    """A node that hears too few of the others, and collectors that get nothing, are errors."""
    said = "a does not hear most of the nodes, nor JetStream: it does what [uplink] minority says"
    assert findings(KnownNodes(Nodes(False, STATES[:1]), {"": ["siem", "archive"]}))[:2] == [
        ("error", "", said),
        ("error", "", "nobody serves siem, archive"),
    ]


def test_nodes_that_nobody_tells_of_are_an_error() -> None:
    """The service that does not tell is named."""
    ((level, _, why),) = findings("the uplink did not tell within 3 s")
    assert (level, why) == ("error", "it is not known which nodes live: the uplink did not tell within 3 s")
