from pathlib import Path
from typing import Final

import pytest

from shared.ledger.counters import STOPPED
from tests.services.uplink.nodes.cluster import Cluster, Exporter
from tests.stack import wait_until

pytestmark = pytest.mark.usefixtures("lab")
PER_SECOND: Final = 50


def test_a_restart_of_the_uplink_alone_costs_nothing(tmp_path: Path) -> None:
    """JetStream has time to acknowledge what this node sends, while its senders of copies go on."""
    with Cluster(tmp_path, "ab", 2) as cluster:
        a = cluster.nodes["a"]
        exporters = [Exporter(name, port, PER_SECOND) for name, port in cluster.ports.items()]
        wait_until(lambda: all(len(each.got) > PER_SECOND for each in cluster.collectors), "copies flow")
        uplink = a.uplink
        assert uplink.stop() == 0
        a.start("uplink")
        cluster.wait_live("a", "b")
        sent = {payload for each in exporters for payload in each.stop()}
        wait_until(lambda: all(each.count().keys() == sent for each in cluster.collectors), "everything came")
        account = uplink.events("drained")[0]["sending/flows"]
        assert account["acknowledged"] == account["taken"] > 0
        assert (account["held"], account.get(STOPPED, 0)) == (0, 0)
