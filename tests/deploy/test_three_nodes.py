"""A cluster of three nodes under load: nodes die, are parted from the others, and are upgraded one by one."""

import os
import random
from functools import partial
from typing import Final

import pytest

from tests.deploy.three_nodes import Cluster, ranges, three_nodes

RATE: Final = int(os.environ.get("FANWIRE_CLUSTER_RATE", "30000"))
PARTED_SECONDS: Final = 30.0

pytestmark = pytest.mark.soak


def test_a_node_is_killed_ten_times(lab: None) -> None:
    """A dead node costs a bounded time, at each collector; what was answered `ok` is there afterwards."""
    with three_nodes(RATE) as cluster:
        for _ in range(10):
            register_everywhere(cluster)
            holder, name = cluster.holder(), random.choice(list(cluster.nodes))
            told = cluster.suffer(name, partial(cluster.kill, name), partial(cluster.moved_from, name))
            print(f"{name} killed, {holder} had the address: {ranges(told)}", flush=True)
            assert ranges(told)["living"][1] == 0
            told = cluster.suffer(name, partial(cluster.start, name), cluster.is_whole)
            print(f"{name} started again: {ranges(told)}", flush=True)
            assert ranges(told)["lost"][1] == 0
        finish(cluster)


def test_a_node_is_parted_from_the_others(lab: None) -> None:
    """A node without network for 30 s costs a bounded time; it comes back by itself, and no registration is lost."""
    with three_nodes(RATE) as cluster:
        for name in (cluster.holder(), *cluster.nodes):
            register_everywhere(cluster)
            told = cluster.suffer(name, partial(cluster.part, name, PARTED_SECONDS), cluster.is_whole)
            print(f"{name} parted: {ranges(told)}", flush=True)
        finish(cluster)


def test_all_nodes_are_upgraded(lab: None) -> None:
    """Each node hands over, ends, and starts again, which loses nothing but what is sent while the address moves."""
    with three_nodes(RATE) as cluster:
        for name in cluster.nodes:
            register_everywhere(cluster)
            told = cluster.suffer(name, partial(cluster.upgrade, name), cluster.is_whole)
            print(f"{name} upgraded: {ranges(told)}", flush=True)
            assert ranges(told)["held"][1] == ranges(told)["living"][1] == 0
            assert ranges(told)["lost"][1] <= RATE // 100  # 10 ms, in which the address moves
        finish(cluster)


def register_everywhere(cluster: Cluster) -> None:
    """Sign a few clients up at each node."""
    assert all(cluster.register(name) for name in cluster.nodes for _ in range(3))


def finish(cluster: Cluster) -> None:
    """Print what was lost in all, when nothing comes late any more; all clients that were answered are on the list."""
    print(f"in all, of {cluster.end()}: {ranges(cluster.totals())}")
    listed = set[str]().union(*(cluster.listed(name) for name in cluster.nodes))
    assert cluster.answered <= listed
