"""The broker under its ceiling: subscribers that stand still cost no more memory than that, and others nothing."""

import time

import pytest

from shared.bus import Publisher, Subscriber
from shared.keys import ROLES, write_keys
from shared.ledger import discrepancies
from shared.link import DIRECT, open_link
from shared.settings import Bus
from shared.wire import Datagrams, datagrams_topic
from tests.builders import BusEnds, accounts_when, make_batch, wait_wanted
from tests.stack import Stack, wait_until

CEILING = 320 << 20
"""Bytes. A queue's share of it is 154 of the messages below."""
STALLED = 20
TOPIC = datagrams_topic("messages")
BODY, BATCH = Datagrams("messages", 1, 0), make_batch([bytes(64_000)] * 8)


def take_all(live: Subscriber, until: int, seconds: float = 20.0) -> int:
    """Take what comes until the publisher's count has reached `until`; return how many datagrams came."""
    came, deadline = 0, time.monotonic() + seconds
    while live.socket.poll(max(0, int(1000 * (deadline - time.monotonic())))):
        while message := live.receive():
            came += len(message.batch or ())
            if message.envelope.total + len(message.batch or ()) >= until:
                return came
    raise AssertionError(f"{came} datagrams came, and the last of {until} did not")


def stall(bus: BusEnds, publisher: Publisher) -> None:
    """Subscribe to everything, and never read."""
    bus.subscriber(TOPIC, high_water_mark=1)
    wait_until(publisher.new_subscriptions, "the subscriber is seen")


def test_stalled_subscribers_are_cut_off(stack: Stack) -> None:
    """Twenty that never read, whose queues would take four times the memory: who reads misses nothing."""
    stack.configure(f"[broker]\nmemory = {CEILING}\n")
    broker = stack.start("broker")
    with BusEnds(stack.bus) as bus:
        publisher, live = bus.publisher(), bus.subscriber(TOPIC)
        wait_wanted(publisher, TOPIC)
        sent = 0
        for _ in range(STALLED):
            stall(bus, publisher)
            for _ in range(40):
                assert publisher.publish(TOPIC, BODY, BATCH)
                sent += len(BATCH)
                assert take_all(live, sent) == len(BATCH)
        accounts = accounts_when(bus, "broker.1", lambda found: found["broker"]["subscribers_cut"] > 0)
    assert list(discrepancies(accounts)) == []
    assert broker.resident_mb("VmHWM") * 2**20 < CEILING
    assert broker.events("subscriber cut off: it reads nothing, and memory is short")


@pytest.mark.parametrize("with_keys", [False, True])
def test_flood_into_stalled_subscribers_waits_at_its_publisher(stack: Stack, with_keys: bool) -> None:
    """When that is too slow nothing passes for a moment: the publisher is refused, which it counts, and all adds up."""
    keys = stack.directory / "keys"
    keys.mkdir()
    list(write_keys(keys, ROLES))
    stack.configure((f'keys = "{keys}"\n' if with_keys else "") + f"[broker]\nmemory = {CEILING}\n")
    broker = stack.start("broker")
    with BusEnds(stack.bus, open_link(Bus(keys=str(keys)), "ingest") if with_keys else DIRECT) as bus:
        publisher = bus.publisher(high_water_mark=16)
        bus.subscriber(TOPIC)  # it too reads only at the end
        wait_wanted(publisher, TOPIC)
        sent = refused = 0
        for _ in range(STALLED):
            stall(bus, publisher)
            until = time.monotonic() + 0.1
            while time.monotonic() < until:
                if publisher.publish(TOPIC, BODY, BATCH):
                    sent += len(BATCH)
                else:
                    refused += 1
                    time.sleep(0.0005)
        live = bus.subscriber(TOPIC)
        wait_until(publisher.new_subscriptions, "the last subscriber is seen")
        wait_until(lambda: publisher.publish(TOPIC, BODY, BATCH), "the bus takes messages again")
        assert take_all(live, sent + len(BATCH))
    assert refused
    assert broker.resident_mb("VmHWM") * 2**20 < CEILING
