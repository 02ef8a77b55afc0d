from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest

from shared.bus.bodies.nodes_message import NODES_TOPIC, Node, Nodes
from shared.process.lifecycle import UNAVAILABLE
from tests.builders import BusEnds, PlayedGateway, make_client, wait_wanted
from tests.stack import Stack

NODE = '[uplink]\nservers = ["nats://127.0.0.1:4222"]\nsite = "a"\nnodes = ["a", "b", "c"]\n'
STATES = [Node("a", "live", 0), Node("b", "silent", 7500, 3), Node("c", "silent")]
CLIENTS = [make_client(f"collector-{number}", streams=("messages",)) for number in range(9)]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A broker alone, with the settings of a node."""
    with Stack(tmp_path_factory.mktemp("node"), NODE) as stack:
        stack.start("broker")
        yield stack


def answer(stack: Stack, told: Nodes, *arguments: str, command: str = "nodes") -> tuple[int, str]:
    """Return the exit code and output of the command while an uplink and a gateway tell this."""
    with BusEnds(stack.bus) as bus, ThreadPoolExecutor(1) as executor:
        uplink, gateway = bus.publisher("uplink.1"), PlayedGateway(bus)
        running = executor.submit(stack.run, command, *arguments)
        wait_wanted(uplink, NODES_TOPIC)
        uplink.publish(NODES_TOPIC, told)
        gateway.announce(3, *CLIENTS, make_client("a name", streams=()))
        code, text, _ = running.result()
        return code, text


def test_who_serves_whom(stack: Stack) -> None:
    """Each node has a line with its state, how far behind it is and its collectors; all are served by those that do."""
    code, text = answer(stack, Nodes(True, STATES, ("a",)))
    rows = [line.split() for line in text.splitlines()]
    assert code == 0
    assert ["b", "silent", "7.5", "s", "ago", "3", "0"] in rows
    assert ["c", "silent", "never", "0", "0"] in rows
    assert any(row[:5] == ["a", "live", "here", "0", "9"] for row in rows)
    assert "collector-4 and 4 more" in text


def test_a_minority_that_serves_nobody(stack: Stack) -> None:
    """The command fails where most nodes are not heard, or a collector is not served, and says so."""
    code, text = answer(stack, Nodes(False, STATES, ()))
    assert code == 1
    assert "a does not hear most of the nodes, nor JetStream: it does what [uplink] minority says" in text
    assert "not served: collector-0, collector-1" in text
    code, text = answer(stack, Nodes(False, STATES, ("a",)), "--json")
    told = msgspec.json.decode(text)
    assert (code, told["majority"], told["not_served"]) == (1, False, [])
    assert told["nodes"][1] == {"name": "b", "state": "silent", "heard_seconds": 7.5, "behind": 3, "collectors": []}


def test_nobody_tells(stack: Stack, tmp_path: Path) -> None:
    """The command names the service that does not tell, or the setting that makes a host a node."""
    code, _, error = stack.run("nodes")
    assert code == UNAVAILABLE
    assert "the uplink did not tell within 3 s; does it run?" in error
    code, _, error = Stack(tmp_path).run("nodes")
    assert code == UNAVAILABLE
    assert "this host is no node of a cluster: [uplink] nodes is empty" in error


def test_doctor_tells_of_nodes(stack: Stack) -> None:
    """`fanwire doctor` finds what this command shows; where nobody tells, it says so."""

    def found(text: str) -> list[tuple[str, str]]:
        every = msgspec.json.decode(text)["findings"]
        return [(each["level"], each["why"]) for each in every if each["name"] == "nodes"]

    _, text = answer(stack, Nodes(True, STATES, ("a",)), "--json", command="doctor")
    assert [level for level, _ in found(text)] == ["ok", "warning", "warning"]
    _, text, _ = stack.run("doctor", "--json")
    assert found(text) == [("error", "it is not known which nodes live: the uplink did not tell within 3 s")]
