"""Collectors of a node that ends, by their own count: what the exporters sent against what the sockets got."""

import signal
import time
from collections import Counter
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Final

import pytest

from shared.ledger.counters import PERHAPS_TWICE
from shared.serving_nodes import BRING_SECONDS
from tests.builders import BusEnds, accounts_when
from tests.services.uplink.nodes.cluster import Cluster, Exporter
from tests.stack import ask_json, wait_until

pytestmark = pytest.mark.usefixtures("lab")
PER_SECOND: Final = 50
SECONDS: Final = 1.5
"""Time that traffic lasts before a node ends: its senders have told where they are, and not just now."""


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """Three nodes with six collectors, and an exporter at each node."""
    with Cluster(tmp_path, "abc", 6) as cluster:
        yield cluster


def begin(cluster: Cluster, nodes: str = "") -> dict[str, Exporter]:
    """Let an exporter send to each of these nodes, or to all."""
    exporters = {name: Exporter(name, cluster.ports[name], PER_SECOND) for name in nodes or cluster.ports}
    time.sleep(SECONDS)
    return exporters


def stop(cluster: Cluster, exporters: dict[str, Exporter]) -> dict[str, list[bytes]]:
    """Return what each exporter has sent, once all has come that will."""
    sent = {name: exporter.stop() for name, exporter in exporters.items()}
    cluster.wait_quiet()
    return sent


def perhaps_twice(cluster: Cluster, names: str) -> Counter[str]:
    """Return how many of the copies that these nodes have sent to each collector may have been sent twice."""
    found: Counter[str] = Counter()
    for name in names:
        with BusEnds(cluster.nodes[name].bus) as bus:
            accounts = accounts_when(bus, "forwarder.1", lambda accounts: accounts)
        for account, counts in accounts.items():
            found[account.removeprefix("collector/")] += counts.get(PERHAPS_TWICE, 0)
    return found


def doubles(cluster: Cluster, sent: Container[bytes] | None = None) -> dict[str, int]:
    """Return how many datagrams, or of those that were sent by then, each collector has had more than once."""
    found: dict[str, int] = {}
    for collector in cluster.collectors:
        counts = collector.count().items()
        found[collector.name] = sum(count - 1 for payload, count in counts if sent is None or payload in sent)
    return found


def test_each_collector_is_served_by_one_node(cluster: Cluster) -> None:
    """Each collector gets every datagram of all nodes once, and all nodes tell the same of who serves whom.

    On a busy machine a node may be silent for so long that another one takes over: then the accounts say so.
    """
    sent = stop(cluster, begin(cluster))
    twice = perhaps_twice(cluster, "abc")
    for collector in cluster.collectors:
        assert collector.count().keys() == {payload for each in sent.values() for payload in each}
    assert all(count <= twice[name] for name, count in doubles(cluster).items())
    told = {name: cluster.told_by(name) for name in "abc"}
    for name, each in told.items():
        assert (each["node"], each["majority"], each["not_served"], each["code"]) == (name, True, [], 0)
        assert each["nodes"][0]["name"] == name
    serve = [{node["name"]: node["collectors"] for node in each["nodes"]} for each in told.values()]
    assert serve[0] == serve[1] == serve[2]
    named = sorted(name for names in serve[0].values() for name in names)
    assert named == [collector.name for collector in cluster.collectors]
    clients = ask_json({"op": "list"}, cluster.nodes["a"].gateway)["clients"].values()
    assert all(client["health"] == ("ok" if client["node"] == "a" else "elsewhere") for client in clients)
    cluster.speak_as("b", b"no beat of b")
    cluster.nodes["a"].uplink.wait_for("a beat of another node is dropped")
    code, text, _ = cluster.nodes["a"].run("nodes")
    assert code == 0
    assert [line.split()[0] for line in text.splitlines() if " live " in line] == ["a", "b", "c"], text


def test_a_node_that_leaves_hands_over(cluster: Cluster) -> None:
    """A node is ended in order: its collectors get each once. It gets them back without a gap."""
    time.sleep(BRING_SECONDS)  # for so long nodes that began together bring what came before once more
    exporters = begin(cluster)
    cluster.end("a", signal.SIGTERM)
    cluster.wait_live("b", "c")
    assert {node["name"]: node["state"] for node in cluster.told_by("b")["nodes"]}["a"] == "left"
    before = {*exporters.pop("a").stop()}
    time.sleep(SECONDS)
    again, took_over = doubles(cluster), perhaps_twice(cluster, "bc")
    before |= {payload for exporter in exporters.values() for payload in exporter.sent}
    before_twice = doubles(cluster, before)
    heard = {name: len(cluster.heard_by(name)) for name in "bc"}
    cluster.nodes["a"].begin()
    cluster.nodes["a"].uplink.wait_for("this node serves collectors from now on")
    cluster.wait_live("a", "b", "c")
    time.sleep(SECONDS)
    sent = stop(cluster, exporters)
    told = perhaps_twice(cluster, "abc")
    for collector in cluster.collectors:
        count, name = collector.count(), collector.name
        assert not [payload for each in sent.values() for payload in each if payload not in count]
        assert again[name] <= took_over[name]
        assert again[name] <= 2 * PER_SECOND * len(cluster.ports)
        assert doubles(cluster)[name] <= told[name]
    again = {name: count - before_twice[name] for name, count in doubles(cluster, before).items()}
    steady = all(cluster.heard_by(name)[count:] == [["a", "b", "c"]] for name, count in heard.items())
    most = 0 if steady else 2 * PER_SECOND * len(cluster.ports)
    assert max(again.values()) <= most, "what was sent before it began does not come again"


def test_a_node_that_dies_is_replaced(cluster: Cluster) -> None:
    """A node is killed: others serve its collectors within 3 s; nothing is missed, at most a second comes twice.

    That holds also for what a node takes in that the dead one has never had anything of.
    """
    exporters = begin(cluster, "ab")
    its = [collector for collector in cluster.collectors if cluster.served_by(collector) == "a"]
    assert its
    cluster.end("a", signal.SIGKILL)
    killed = time.monotonic()
    exporters["c"] = Exporter("c", cluster.ports["c"], PER_SECOND)
    cluster.wait_live("b", "c")
    assert time.monotonic() - killed < 10  # 3 s where the machine has time for all
    lost = exporters.pop("a").stop()
    told = cluster.told_by("b")
    assert {node["name"]: node["state"] for node in told["nodes"]} == {"b": "live", "a": "silent", "c": "live"}
    assert (told["majority"], told["not_served"], told["code"]) == (True, [], 0)
    time.sleep(SECONDS)
    sent = stop(cluster, exporters)
    twice = perhaps_twice(cluster, "bc")
    for collector in cluster.collectors:
        count = collector.count()
        for name, each in sent.items():
            assert not [payload for payload in each if payload not in count], name
        again = sum(times - 1 for times in count.values())
        assert again <= twice[collector.name]
        if collector not in its:
            continue
        assert twice[collector.name] <= 2 * PER_SECOND * len(cluster.ports)
        assert all(times <= 2 for times in count.values())
        # Of the dead node's own it has a beginning, and what never left that node is the end.
        had = [payload for payload in lost if payload in count]
        assert had == lost[: len(had)]


def is_collector(account: str) -> bool:
    """Return whether an account is one of a collector."""
    return account.startswith("collector/")


@pytest.mark.parametrize("minority", ["serve", "hold"])
def test_a_node_that_hears_nobody(tmp_path: Path, minority: str) -> None:
    """Without a NATS server each node serves its own collectors as before, or none, and says so; healed, all are."""
    with Cluster(tmp_path, "ab", 4, f'\nminority = "{minority}"') as cluster:
        cluster.wait_served("a", "b")
        its = {collector.name: cluster.served_by(collector) for collector in cluster.collectors}
        cluster.server.stop()
        for node in cluster.nodes.values():
            wait_until(lambda: '"majority": false' in node.uplink.text, "it hears nobody")  # noqa: B023
            with BusEnds(node.bus) as bus:
                serves = minority == "serve"
                accounts_when(bus, "forwarder.1", lambda accounts: serves == any(map(is_collector, accounts)))  # noqa: B023
        sent = stop(cluster, begin(cluster))
        for collector in cluster.collectors:
            expected = sent[its[collector.name]] if minority == "serve" else []
            assert collector.got == expected
        code, text, _ = cluster.nodes["a"].run("nodes")
        assert code == 1
        assert "a does not hear most of the nodes" in text
        assert ("not served: " in text) == (minority == "hold")
        cluster.server.start()
        cluster.wait_live("a", "b")
        cluster.wait_served("a", "b")
        assert {collector.name: cluster.served_by(collector) for collector in cluster.collectors} == its
