import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from shared.bus.bodies.nodes_message import Node
from shared.bus.kept_counts import KeptFile
from shared.client import Client, Resume, Withheld
from shared.datagrams.gathered import Gathered
from shared.fanout.collectors import Collectors
from shared.fanout.kernel_copies import KernelRules
from shared.fanout.served_collector import MARKS
from shared.fanout.streams import Unserved
from shared.ledger.counters import COLLECTOR_COUNTERS
from shared.ledger.equations import discrepancies
from tests.builders import make_batch, make_client

OURS, THEIRS = "192.0.2.1", "198.51.100.1"


class Life:
    """The collectors of one process, whose destinations only count what they are told to; its end is a SIGKILL."""

    def __init__(self, path: Path, *clients: Client) -> None:
        self.kept = KeptFile(path)
        sheet = self.kept.open()
        self.published = self.kept.new_counts(sheet.tables.get("published/", {}))
        self.collectors = Collectors[Any](
            ["messages"], self.published, self._reach, KernelRules("relay"), self.kept.new_counts
        )
        self.collectors.restore(sheet)
        self.sent: dict[str, Counter[str]] = {}
        self.collectors.replace(clients)
        self._turn()

    def _turn(self) -> None:
        """Keep counters that are new, as the loop does after each turn."""
        self.kept.keep(
            self.collectors.clients,
            cast(Any, {"published/": self.published, **self.collectors.tables()}),
            {"collector": COLLECTOR_COUNTERS, "marks": MARKS},
        )

    def _reach(self, client: Client, account: Counter[str]) -> Any:
        self.sent[client.name] = account

        def drop(cause: str) -> None:
            account[cause] += account["held"]
            account["held"] = 0

        held = SimpleNamespace(paused=False, drop=drop, count_templates=lambda: None)
        destination = SimpleNamespace(client=client, held=held, close=lambda: None)
        destination.adopt = lambda client: setattr(destination, "client", client)
        return destination

    def take(self, count: int, *, routed: bool = True) -> None:
        """Take datagrams from the bus, half of them from each exporter; `routed` or not before the end."""
        self.published["messages"] += count
        if routed:
            self.collectors.route(Gathered([make_batch([b""] * count, (OURS, THEIRS))]))
        self._turn()

    def end(self) -> None:
        """Leave it as a killed process does."""
        self.kept.close()

    def account(self, name: str = "a") -> dict[str, int]:
        """A collector's account; all add up."""
        accounts = self.collectors.accounts()
        assert list(discrepancies(accounts)) == []
        return {counter: count for counter, count in accounts[f"collector/{name}"].items() if count}


def test_only_collectors_that_others_reach_may_have_got_copies_of_theirs(tmp_path: Path) -> None:
    """Another node has served without this one: what was sent is counted, but for a collector that only we reach."""
    life = Life(tmp_path / "kept", make_client("a"), make_client("b", node="here"))
    for missed in (0, 1):
        life.collectors.note_nodes([Node("here", "live"), Node("there", "live", 0, missed=missed)])
        for account in life.sent.values():
            account["sent"] += 5
    life.collectors.note_nodes([Node("here", "live"), Node("there", "live", 0, missed=2)])
    assert {name: account["perhaps_twice"] for name, account in life.sent.items()} == {"a": 10, "b": 0}
    life.end()


def test_what_was_sent_to_a_collector_that_was_left_meanwhile_is_counted(tmp_path: Path) -> None:
    """Another node tells that it has served without this one, which has left a collector to others by then."""
    life = Life(tmp_path / "kept", make_client("a"))
    for missed, silent in ((0, False), (0, True), (0, True), (1, False)):
        state, age_ms = ("silent", 9000) if silent else ("live", 0)
        life.collectors.note_nodes([Node("here", "live"), Node("there", state, age_ms, missed=missed)])  # type: ignore[arg-type]
        if silent:
            life.collectors.replace([])
        else:
            for account in life.sent.values():
                account["sent"] += 5
    assert life.collectors.counters["perhaps_twice"] == 5
    life.end()


def test_what_a_collector_got_before_it_left_and_came_back_is_not_counted(tmp_path: Path) -> None:
    """It comes back to its account; another node tells then that it has served without this one just now."""
    life = Life(tmp_path / "kept", make_client("a"))
    life.sent["a"]["sent"] += 1000
    for clients, missed in (([make_client("a")], 0), ([], 0), ([make_client("a")], 1)):
        life.collectors.replace(clients)
        life.sent["a"]["sent"] += 5 * missed
        life.collectors.note_nodes([Node("here", "live"), Node("there", "live", 0, missed=missed)])
    assert (life.sent["a"]["perhaps_twice"], life.collectors.counters["perhaps_twice"]) == (5, 0)
    life.end()


def test_late_copies_that_another_node_may_have_sent_are_counted(tmp_path: Path) -> None:
    """Another node has served without this one: what was received before it told that, and comes now, is counted."""
    life = Life(tmp_path / "kept", make_client("a"), make_client("b", node="here"))
    for missed in (0, 1):
        life.collectors.note_nodes([Node("here", "live"), Node("there", "live", 0, missed=missed)])
    for received_ns in (0, time.time_ns()):
        life.collectors.route(Gathered([replace(make_batch([b""] * 10), received_ns=received_ns)]))
    assert {name: account["perhaps_twice"] for name, account in life.sent.items()} == {"a": 10, "b": 0}
    life.end()


def test_copies_that_another_node_may_have_sent_are_counted(tmp_path: Path) -> None:
    """A collector that was taken over: of its live copies those count that were received before its last node ended."""
    received_ns = make_batch([]).received_ns
    for until_ns, twice in ((received_ns, 0), (received_ns + 1, 10)):
        life = Life(tmp_path / f"{until_ns}", make_client("a", resume=Resume(1, twice_until_ns=until_ns)))
        life.collectors.route(Gathered([make_batch([b""] * 10)]))
        assert life.sent["a"]["perhaps_twice"] == twice
        life.end()


def test_a_killed_process_leaves_nothing_without_a_cause(tmp_path: Path) -> None:
    """Copies that waited are lost, those in hand unsure, and both are in the account with which the next goes on."""
    life = Life(tmp_path / "accounts", make_client("a"))
    life.take(10)
    life.sent["a"]["sent"] += 6
    life.sent["a"]["held"] += 3  # of the ten, one was just being sent
    life.take(4, routed=False)
    life.end()
    life = Life(tmp_path / "accounts", make_client("a"), make_client("new", 10))
    expected = {"expected": 14, "offered": 14, "sent": 6, "dropped_stopped": 3, "dropped_unsure": 5}
    assert life.account() == expected
    assert life.account("new") == {}
    life.take(2)
    life.sent["a"]["sent"] += 2
    life.sent["new"]["sent"] += 2
    assert life.account() == expected | {"expected": 16, "offered": 16, "sent": 8}
    life.end()
    life = Life(tmp_path / "accounts", make_client("a"))
    assert life.account() == expected | {"expected": 16, "offered": 16, "sent": 8}
    life.end()


def test_what_an_admin_withholds_is_counted_apart(tmp_path: Path) -> None:
    """A withheld collector gets nothing of what it would have got, nor what waited; released it gets all that comes."""
    some = make_client("a", prefixes=(f"{OURS}/32",))
    withheld = msgspec.structs.replace(some, withheld=Withheld("ops", 1.0))
    life = Life(tmp_path / "accounts", some)
    life.take(10)
    life.sent["a"].update(sent=2, held=3)
    life.collectors.replace([withheld])
    assert life.account() == {"expected": 10, "offered": 10, "filtered": 5, "sent": 2, "withheld_by_admin": 3}
    assert life.collectors.route(Gathered([make_batch([b""] * 4, (OURS, THEIRS))])) == []
    life.published["messages"] += 4
    kept_back = {"expected": 14, "offered": 14, "filtered": 7, "sent": 2, "withheld_by_admin": 5}
    assert life.account() == kept_back
    life.end()
    life = Life(tmp_path / "accounts", withheld)
    assert life.account() == kept_back
    life.collectors.replace([some])
    life.take(2)
    life.sent["a"]["sent"] += 1
    assert life.account() == kept_back | {"expected": 16, "offered": 16, "filtered": 8, "sent": 3}
    life.end()


def test_what_a_filter_left_out_is_not_unsure(tmp_path: Path) -> None:
    """Datagrams that a killed process had filtered stay filtered; of those in hand nobody knows."""
    some = make_client("a", prefixes=(f"{OURS}/32",))
    life = Life(tmp_path / "accounts", some)
    life.take(10)
    life.sent["a"]["sent"] += 4
    life.end()
    life = Life(tmp_path / "accounts", some)
    assert life.account() == {"expected": 10, "offered": 10, "filtered": 5, "sent": 4, "dropped_unsure": 1}
    life.end()


@pytest.mark.parametrize(
    ("fields", "charged"), [({}, True), ({"generation": 2}, False), ({"generation": 2, "port": 10}, False)]
)
def test_what_nobody_served_is_owed_to_those_that_were_served(
    tmp_path: Path, fields: dict[str, Any], charged: bool
) -> None:
    """A gap between two processes counts for a collector of the last one, and for none that came later."""
    life = Life(tmp_path / "accounts", make_client("a"))
    life.end()
    life = Life(tmp_path / "accounts", make_client("a", **({"port": 9} | fields)))
    life.published["messages"] += 7
    life.collectors.count_unserved(Unserved("messages", 7, before=True))
    assert life.account() == ({"expected": 7, "dropped_unserved": 7} if charged else {})
    life.published["messages"] += 2
    life.collectors.count_unserved(Unserved("messages", 2, before=False))
    assert life.account()["dropped_unserved"] == (9 if charged else 2)
    life.end()
