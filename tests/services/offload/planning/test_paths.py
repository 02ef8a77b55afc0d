from services.offload.planning.paths import BEING_TOLD, paths_of
from shared.bus.bodies.offload_messages import MAX_REASON, CollectorPath
from tests.builders import make_client


def test_each_collector_has_the_way_of_its_copies_and_a_reason_unless_it_is_the_kernel() -> None:
    """Those that the plan serves are served once the rules are there, unless these were refused."""
    clients = [
        make_client("a", 1, streams=("syslog",), source="original"),
        make_client("b", 2, streams=("syslog",), source="relay"),
        make_client("c", 3, streams=("syslog",), source="original", address="10.2.0.7"),
        make_client("d", 4, streams=("syslog",), source="original"),
        make_client("no collector", 5, streams=()),
    ]
    refused = "the rules with it were refused: "
    for refusal, reason in (
        ("", BEING_TOLD),
        ("refused: why", f"{refused}why"),
        (300 * "x", f"{refused}{300 * 'x'}"[:MAX_REASON]),
    ):
        found = paths_of(clients, {"a"}, {"d": "a reason"}, refusal, lambda address: address == "10.2.0.7")
        assert found == [
            CollectorPath("a", "kernel"),
            CollectorPath("b", "relay", reason),
            CollectorPath("c", "packets", reason),
            CollectorPath("d", "frames", "a reason"),
        ]
