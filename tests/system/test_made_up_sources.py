"""A flood from sources that are made up: memory, accounts and log stay as they were, and what is dropped is counted."""

import json
import random
import socket
from collections.abc import Iterator
from contextlib import ExitStack, closing
from typing import Any

import pytest

from services.ingest.flows.exporters import MAX_EXPORTERS
from tests.forging import forged, forging
from tests.openly import OpenStack
from tests.services.ingest.flows.exported import netflow_v9
from tests.stack import PATIENCE_SECONDS, PATIENT, sign_up, wait_until
from tests.traffic import open_receiver

SETTINGS = f"""{PATIENT}
[[stream]]
name = "flooded"
listen = ["udp://127.0.0.1:6667"]
receive_buffer = 262144
protocol = "netflow"
reply = "noted"
[[stream]]
name = "quiet"
listen = ["udp://127.0.0.1:6668"]
"""
MORE_MB = 30
"""Growth allowed to a process: far less than a table with a row for each source would be."""


def packets(numbers: range) -> Iterator[bytes]:
    """Flow datagrams, each from an address, a port and a source id of its own, and of any size."""
    draw = random.Random(numbers.start)
    for number in numbers:
        address = f"127.{draw.randrange(1, 256)}.{draw.randrange(256)}.{draw.randrange(1, 255)}"
        payload = netflow_v9(1, source_id=number, rest=bytes(draw.randrange(0, 1200)))
        yield forged((address, draw.randrange(65_536)), ("127.0.0.1", 6667), payload, checksum=False)


@pytest.mark.parametrize("count", [20_000, pytest.param(1_000_000, marks=pytest.mark.soak)])
def test_made_up_sources_fill_nothing(open_stack: OpenStack, count: int) -> None:
    """Every datagram is received or counted as dropped, no process grows, another stream goes on, whatever the sources.

    Tables of exporters, fragments, groups and replies are bounded; no account and no line of the log has a source.
    """
    open_stack.configure(SETTINGS)
    open_stack.start_all()
    open_stack.start("transmitter")
    quiet, _ = open_receiver("127.0.0.1", 9101)
    with (
        ExitStack() as flooded,
        closing(quiet),
        closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as sender,
        forging() as forger,
    ):
        original = {"source": "original"}
        kinds: list[dict[str, Any]] = [{}, original, {"group": "g"}, original | {"from": ["127.0.0.0/9"]}]
        for number, kind in enumerate(kinds):
            flooded.enter_context(open_receiver("127.0.0.1", 9110 + number, 4096)[0])
            sign_up({"name": f"c{number}", "streams": ["flooded"], "port": 9110 + number} | kind)
        sign_up({"name": "q", "streams": ["quiet"], "port": 9101})
        quiet.settimeout(60)
        services = list(open_stack.running)
        names: list[set[str]] = []
        sizes: list[dict[str, float]] = []
        for half in (range(count // 2), range(count // 2, count)):
            for number, packet in zip(half, packets(half), strict=True):
                forger.send_packet(packet, ("127.0.0.1", 6667))
                if number % 2000 == 0:
                    sender.sendto(b"%d" % number, ("127.0.0.1", 6668))
                    assert quiet.recv(100) == b"%d" % number
            found = settled(open_stack)
            names.append({name for accounts in found.values() for name in accounts})
            sizes.append({running.name: running.resident_mb() for running in services})
        stream = found["ingest.1"]["stream/flooded"]
        assert stream["received"] + stream["kernel_dropped"] == count
        assert stream["exporters"] == min(MAX_EXPORTERS, stream["received"])
        assert stream["exporters"] + stream.get("exporter_evictions", 0) == stream["received"]
        assert names[0] == names[1]
        for name, size in sizes[1].items():
            assert size < sizes[0][name] + MORE_MB, f"{name} has grown from {sizes[0][name]} to {size} MB"
        for running in services:
            assert len(running.text.splitlines()) < 30, running.text[-3000:]
            assert "127.1" not in running.text.replace("127.0.0.1", "")


def settled(open_stack: OpenStack) -> dict[str, dict[str, dict[str, int]]]:
    """All accounts, once everybody has taken what there was, and they add up."""
    found: dict[str, dict[str, dict[str, int]]] = {}

    def balanced() -> bool:
        ledger = open_stack.operator("ledger", "--json")
        ledger.process.wait(PATIENCE_SECONDS)
        found.update(json.loads(ledger.text)["services"])
        return ledger.process.returncode == 0

    wait_until(balanced, "the accounts add up")
    return found
