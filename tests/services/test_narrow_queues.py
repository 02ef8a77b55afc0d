"""Runs of copies and queues of interfaces that cut or refuse them: every copy arrives, or is counted under a cause."""

import socket
from contextlib import ExitStack, closing

import pytest

from shared.ledger.equations import dropped
from tests.builders import make_batch, make_client
from tests.network import End, Host, veth
from tests.services.forwarder.sent import Sent
from tests.services.transmitter.site import SIEM4, Copied, Site, payloads

pytestmark = pytest.mark.usefixtures("lab")
SIZE, BATCHES, ROWS = 1000, 20, 50
SHAPES = (
    "tbf rate 20mbit burst 5000 limit 100000",
    "tbf rate 20mbit burst 2000 limit 30000",
    "tbf rate 20mbit burst 90000 limit 40000",
    "bfifo limit 30000",
    "tbf rate 20mbit burst 70000 limit 150000",
)
"""Queues that cut runs and lose pieces, that never have room for one, and one that takes them whole."""


def shape(host: Host, queue: str) -> None:
    """Give the relay's interface a queue."""
    try:
        host.run(*f"tc qdisc replace dev up root {queue}".split())
    except (AssertionError, FileNotFoundError) as error:
        pytest.skip(f"no traffic shaping here: {error}")


def numbered(batch: int) -> list[bytes]:
    """Payloads of equal length, which leave as runs, numbered through all batches."""
    return [(b"%06d" % number).ljust(SIZE, b".") for number in range(batch * ROWS, (batch + 1) * ROWS)]


@pytest.mark.parametrize("queue", SHAPES)
def test_relayed_copies_arrive_or_are_counted(opened: ExitStack, queue: str) -> None:
    """Copies that the forwarder counts as delivered arrive; the rest has waited in vain, and is dropped."""
    relay, siem = opened.enter_context(Host()), opened.enter_context(Host())
    opened.enter_context(veth(End(relay, "up", "10.2.0.1/24"), End(siem, "eth", f"{SIEM4}/24")))
    copied = opened.enter_context(Copied(siem, "eth"))
    opened.enter_context(closing(siem.socket(socket.AF_INET, socket.SOCK_DGRAM))).bind((SIEM4, 9514))
    with relay.entered():
        sent = Sent(opened, make_client("siem", 9514, address=SIEM4), queue_seconds=0.2, send_buffer=4 << 20)
        shape(relay, queue)
        sent.refresh()
        for number in range(BATCHES):
            account = sent.send(make_batch(numbered(number)))["collector/siem"]
        while account.get("held"):
            account = sent.work()["collector/siem"]
    check(account, copied)


@pytest.mark.parametrize("queue", SHAPES)
def test_original_copies_arrive_or_are_counted(opened: ExitStack, queue: str) -> None:
    """Copies that the transmitter counts as delivered arrive, planned one by one or as columns; the rest is dropped."""
    site = Site(opened)
    copied = opened.enter_context(Copied(site.siem, "eth"))
    shape(site.relay, queue)
    site.relay.neighbour(SIEM4, site.eth.link_address, "up")
    site.turn()
    for number in range(BATCHES):
        rows = numbered(number) + (numbered(BATCHES + number) if number % 2 else [])
        site.send(*rows, sources=["192.0.2.1"])
    check(site.account, copied)


def check(account: dict[str, int], copied: Copied) -> None:
    """The copies that arrived are those that are counted, each once and in order."""
    arrived = payloads(copied.read(account["sent"]))
    assert len(arrived) == account["sent"] > 0
    assert len(arrived) == len({*arrived})
    assert account["sent"] + dropped(account) == account["offered"]
