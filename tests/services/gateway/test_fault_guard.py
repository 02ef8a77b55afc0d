"""Faults of ours in a turn of the loop: they are logged, and the loop goes on."""

from structlog.testing import capture_logs

from services.gateway.registry.registry import Registry
from services.gateway.server import Server


def test_a_fault_in_what_is_due_costs_one_turn() -> None:
    """An error that nobody expected in a change that the tick makes is logged, and the next turn makes the change."""
    server, made = object.__new__(Server), list[str]()
    server.registry, server._making = Registry(lambda: 0.0, 1), set()

    def fail() -> None:
        raise KeyError("odd")

    with capture_logs() as logs:
        server._make_once("expire", fail)
        server._make_once("expire", lambda: made.append("expire"))
    assert made == ["expire"]
    assert [(each["event"], each["what"], each["reason"]) for each in logs] == [
        ("what is due each second has failed, and is tried again", "expire", "KeyError('odd')")
    ]
