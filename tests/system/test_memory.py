"""Processes near their ceilings drop by the policy, count it, and go on."""

import time
from functools import partial

from shared.ledger.accounts import Accounts
from tests.builders import BusEnds, accounts_when
from tests.capture import Collector
from tests.openly import OpenStack
from tests.stack import flows_to, wait_until
from tests.system.test_isolation import LIVE
from tests.system.test_source_preserving import EXPORTERS, SETTINGS, Exporters, small_site

CEILING = 64 << 20
SENT = 4_000
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
    open_stack.by_exec = True  # memory is to be the forwarder's own
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
            wait_until(lambda: flows_to("slow"), "copies flow")
        forwarder, most, sent = open_stack["forwarder"], 0.0, 0
        found: dict[str, int] = {}
        with Exporters(field, EXPORTERS, "10.1.0.1") as exporters, BusEnds(open_stack.bus) as bus:
            while not found.get("dropped_memory"):  # where the machine is busy, batches are fewer and not as tiny
                for number in range(SENT):
                    exporters.send(EXPORTERS[0], bytes(60))
                    if number % 4 == 0:
                        time.sleep(0.0003)
                    if number % 100 == 0:
                        most = max(most, forwarder.resident_mb("RssAnon"))
                sent += SENT
                assert sent < 50 * SENT, found
                stream = accounts_when(bus, "ingest.1", partial(is_taken, sent))["stream/messages"]
                account = accounts_when(bus, "forwarder.1", partial(is_owed, stream["published"]))["collector/slow"]
                found.update(account)
        assert most * 2**20 < CEILING


def is_taken(sent: int, accounts: Accounts) -> bool:
    """Return whether ingest has counted all that were sent."""
    stream = accounts["stream/messages"]
    return stream["received"] + stream["kernel_dropped"] == sent


def is_owed(published: int, accounts: Accounts) -> bool:
    """Return whether the slow collector's account has as many datagrams as were published."""
    return accounts["collector/slow"]["expected"] == published
