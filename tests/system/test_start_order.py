"""Services find each other whoever comes first."""

import random
import socket
import time
from contextlib import closing

import pytest

from tests.openly import OpenStack
from tests.stack import PATIENT, sign_up
from tests.traffic import open_receiver

SERVICES = ("broker", "gateway", "ingest.1", "ingest.2", "forwarder", "transmitter")


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(2, 12))])
def test_any_order_ends_in_delivery(open_stack: OpenStack, seed: int) -> None:
    """Started in a random order, some together and some apart, all become ready, and copies of both kinds flow."""
    draw = random.Random(seed)
    open_stack.configure(PATIENT)
    for name in draw.sample(SERVICES, len(SERVICES)):
        open_stack.start(name, ready=False)
        time.sleep(draw.choice([0, 0, 0.3, 1.0]))
    for running in open_stack.running:
        running.wait_for('"ready"')
    receiver, _ = open_receiver("127.0.0.1", 9100)
    with closing(receiver), closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as sender:
        for source in ("relay", "original"):
            sign_up({"name": source, "streams": ["messages"], "port": 9100, "source": source})
        receiver.settimeout(60)
        for number in range(20):
            sender.sendto(b"%d" % number, ("127.0.0.1", 6667))
            assert [receiver.recv(100), receiver.recv(100)] == [b"%d" % number] * 2
    for running in open_stack.running:
        assert running.process.poll() is None, running.text
        assert not [line for line in running.log if line["level"] == "error"]
