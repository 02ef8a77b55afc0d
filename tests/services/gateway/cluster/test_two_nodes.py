"""The registry that two nodes share: whatever one of them has answered holds at the other."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.services.gateway.cluster.nodes import Node, Servers, agree

pytestmark = pytest.mark.usefixtures("lab")


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """One NATS server."""
    with Servers(tmp_path_factory.mktemp("servers"), 1) as servers:
        yield servers


@pytest.fixture
def nodes(servers: Servers, tmp_path: Path) -> Iterator[tuple[Node, Node]]:
    """Two nodes that share a registry of their own."""
    with Node(tmp_path / "a", "a", servers) as a, Node(tmp_path / "b", "b", servers) as b:
        yield a.begin(), b.begin()


def test_an_entry_is_everywhere(nodes: tuple[Node, Node]) -> None:
    """An entry that one node has answered is at the other, with its generation and the same revision."""
    a, b = nodes
    answer = a.register("siem", streams=["messages"], port=9514)
    assert answer["ok"], answer
    agree(a, b)
    assert b.clients()["siem"]["generation"] == answer["client"]["generation"]
