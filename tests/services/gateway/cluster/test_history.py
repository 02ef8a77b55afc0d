"""Registry operations of several clients at several nodes, while servers and gateways are killed and frozen."""

import random
import signal
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from threading import Event
from typing import Final

import pytest

from tests.services.gateway.cluster.history import Call, Client, History, faults
from tests.services.gateway.cluster.nodes import Node, ServersApart, agree, leader_of
from tests.services.uplink.nats import NatsCluster
from tests.stack import wait_until

pytestmark = pytest.mark.usefixtures("lab")
NAMES: Final = ("one", "two", "three")


def run(directory: Path, nodes: int, rounds: int, seed: int, *, apart: bool = False) -> History:
    """Run clients while this number of troubles comes and goes; check the history and return it."""
    history, stop, chance = History(), Event(), random.Random(seed)
    with ExitStack() as all_ends:
        found_servers = ServersApart(directory / "servers") if apart else NatsCluster(directory / "servers", 3)
        servers = all_ends.enter_context(found_servers)
        found = [all_ends.enter_context(Node(directory / name, name, servers)) for name in "abc"[:nodes]]
        for node in found:
            node.begin()
        clients = [Client(history, found, NAMES, seed + number, stop) for number in range(4)]
        for client in clients:
            client.start()
        for number in range(rounds):
            time.sleep(chance.uniform(0.5, 1.5))
            _trouble(number, chance, servers, found)
        wait_until(
            lambda: _answered(history) >= {node.name for node in found}, lambda: f"all answer: {_words(history)}"
        )
        stop.set()
        for client in clients:
            client.join(60)
        agree(*found)
        last = {name: client["generation"] for name, client in found[0].clients().items()}
        for node in found:
            assert "Traceback" not in node["gateway"].text
    contradictions = faults(history, NAMES, last)
    assert not contradictions, "\n".join(contradictions)
    return history


def _words(history: History) -> Counter[tuple[str, str]]:
    """Count the answers, by node and word."""
    return Counter((call.node, call.word) for call in [*history.calls])


def _answered(history: History) -> set[str]:
    """Return the nodes that have answered several calls with `ok`, however long that takes on a busy machine."""
    return {node for (node, word), count in _words(history).items() if word == "ok" and count > 10}


def _trouble(number: int, chance: random.Random, servers: NatsCluster, nodes: list[Node]) -> None:
    """Cause a trouble and end it: a server killed, the leader frozen or cut off, a gateway killed."""
    leader = leader_of(servers)
    kind = number % (5 if isinstance(servers, ServersApart) else 4)
    if kind in (0, 3):
        server = leader if kind == 0 else chance.choice([each for each in servers.each if each is not leader])
        server.stop()
        time.sleep(chance.uniform(0.5, 7))
        servers.start(server)
    elif kind == 1:
        leader.freeze()
        time.sleep(chance.uniform(1, 12))
        assert leader.process is not None
        leader.process.send_signal(signal.SIGCONT)
    elif kind == 4:
        assert isinstance(servers, ServersApart)
        index = chance.choice([servers.each.index(leader), 0, 1, 2])
        servers.cut_off(index)
        time.sleep(chance.uniform(3, 30))
        servers.heal(index)
    else:
        node = chance.choice(nodes)
        node["gateway"].stop(signal.SIGKILL)
        if chance.random() < 0.5:  # for so long that others measure the leases of its entries
            said = "a node has gone: its clients' leases are measured by another one"
            wait_until(lambda: any(said in each["gateway"].text for each in nodes if each is not node), said)
        node.start("gateway")
    for node in nodes:
        wait_until(lambda node=node: node.register(f"probe-{node.name}", take_over=True)["ok"], "it goes on")  # type: ignore[misc]


def test_no_answer_is_lost_or_stale(tmp_path: Path) -> None:
    """The leader of the servers is killed under load: each answer of two nodes holds, and both agree at the end."""
    history = run(tmp_path, nodes=2, rounds=1, seed=1)
    assert _answered(history) == {"a", "b"}


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(100, 104))
def test_no_answer_is_lost_or_stale_for_long(tmp_path: Path, seed: int) -> None:
    """The same with three nodes, while servers are killed, frozen and cut off, and gateways killed."""
    history = run(tmp_path, nodes=3, rounds=15, seed=seed, apart=True)
    assert sum(call.ok for call in history.calls) > 300


def test_the_check_finds_what_it_is_for() -> None:
    """A history that is made up with each fault is found to have it; one without is not."""

    def call(op: str, generation: int, begin: float, end: float, word: str = "ok", take_over: bool = False) -> Call:
        return Call(op, "one", "a", begin, generation, take_over, end, word)

    good = [
        call("register", 1, 0, 1),
        call("renew", 1, 2, 3),
        call("register", 2, 2, 4, take_over=True),
        call("renew", 1, 3.5, 5),
        call("leave", 2, 6, 7),
        call("register", 3, 6.5, 8),
    ]
    assert faults(History(good), ["one"], {"one": 3}) == []
    for more, last, said in (
        ([call("renew", 2, 9, 10)], 3, "stale ok"),
        ([call("leave", 1, 9, 10)], 3, "stale ok"),
        ([], 2, "lost"),
        ([], 0, "lost"),
        ([], 4, "nobody asked for"),
        ([call("leave", 3, 9, 10)], 3, "there again"),
        ([call("register", 4, 9, 10)], 4, "a name given twice"),
        ([call("register", 3, 9, 10, take_over=True)], 3, "one generation for two"),
        ([call("register", 4, -2, -1, take_over=True)], 4, "generations against time"),
    ):
        (found, *_) = faults(History([*good, *more]), ["one"], {"one": last} if last else {})
        assert found.startswith(said)
