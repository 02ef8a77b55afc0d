"""Processes near their ceilings drop by the policy, count it, and go on."""

import time

from tests.builders import BusEnds, accounts_when
from tests.capture import Collector
from tests.openly import OpenStack
from tests.stack import ask_json, wait_until
from tests.system.test_isolation import LIVE
from tests.system.test_source_preserving import EXPORTERS, SETTINGS, Exporters, small_site

CEILING = 64 << 20
SENT = 20_000
CROWDED = f"""
[forwarder]
memory = {CEILING}
held_memory = {CEILING // 2}
queue_bytes = {CEILING // 2}
queue_seconds = 60
[ingest]
fill_ms = 0
"""
"""Datagrams wait a minute, and come in batches of one, which take far more memory than their bytes."""


def test_crowd_of_tiny_batches(open_stack: OpenStack) -> None:
    """A slow collector for which very many tiny batches wait: the oldest half goes each time that memory is short."""
    with small_site(open_stack) as (field, relay, siem), Collector(siem, "10.2.0.2", LIVE):
        open_stack.configure(
            f'{SETTINGS}{CROWDED}[[collector]]\nname = "slow"\nstreams = ["*"]\naddress = "10.2.0.2"\nport = {LIVE}\n'
        )
        queue = ["tbf", "rate", "100kbit", "burst", "5000", "limit", "5000"]
        relay.run("tc", "qdisc", "add", "dev", "siem", "root", *queue)
        with relay.entered():
            for name in ("gateway", "forwarder", "ingest.1"):
                open_stack[name].stop()
                open_stack.start(name)
            wait_until(lambda: ask_json({"op": "list"})["clients"]["slow"]["health"] != "fresh", "copies flow")
        forwarder, most = open_stack["forwarder"], 0.0
        with Exporters(field, EXPORTERS, "10.1.0.1") as exporters:
            for number in range(SENT):
                exporters.send(EXPORTERS[0], bytes(60))
                if number % 4 == 0:
                    time.sleep(0.0003)
                if number % 100 == 0:
                    most = max(most, forwarder.resident_mb("RssAnon"))
        with BusEnds(open_stack.bus) as bus:
            accounts = accounts_when(bus, "forwarder.1", lambda found: found["collector/slow"]["expected"] == SENT)
        found = accounts["collector/slow"]
        assert found["dropped_memory"] > 0
        assert most * 2**20 < CEILING
