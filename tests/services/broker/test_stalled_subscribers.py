"""The broker under its ceiling: subscribers that stand still cost no more memory than that, and others nothing."""

import time
from pathlib import Path

import pytest

from services.broker.proxy import Proxy
from services.broker.stalled_subscribers import FAR_MS, NEAR_MS, StalledSubscribers
from shared.bus.curve_keys import ROLES, write_keys
from shared.bus.endpoint import DIRECT, open_link
from shared.bus.messages import Datagrams, datagrams_topic
from shared.bus.zmq_sockets import Publisher, Subscriber
from shared.ledger.equations import discrepancies
from shared.process.memory import Memory
from shared.settings.tables import Bus
from tests.builders import BusEnds, accounts_when, make_batch, wait_wanted
from tests.stack import Stack, wait_until

CEILING = 320 << 20
"""Bytes. A queue's share of it is 154 of the messages below."""
STALLED = 20
TOPIC = datagrams_topic("messages")
BODY, BATCH = Datagrams("messages", 1, 0), make_batch([bytes(64_000)] * 8)


def take_all(live: Subscriber, until: int) -> int:
    """Take what comes until the publisher's count has reached `until`; return how many datagrams came."""
    came, deadline = 0, time.monotonic() + 20
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


class PlayedMemory(Memory):
    """Memory of which as much is taken as the test says."""

    def measure(self) -> bool:
        """Return whether less than half is left."""
        self.short = self.used > self.ceiling // 2
        return self.short


def test_nothing_passes_from_three_quarters_on(tmp_path: Path) -> None:
    """The loop is told once to hold messages, and once to pass them again; it is looked at more often by then."""
    orders: list[bool] = []
    memory = PlayedMemory(1000 << 20)
    stalled = StalledSubscribers(memory, tmp_path / "subscribe", frozenset(), orders.append)
    pauses = []
    for megabytes in (0, 260, 750, 751, 1000, 750, 740, 0):
        memory.used = megabytes << 20
        pauses.append(stalled.relieve_memory())
    assert orders == [True, False]
    assert pauses == [FAR_MS, pauses[1], *[NEAR_MS] * 5, FAR_MS]
    assert NEAR_MS < pauses[1] < FAR_MS
    unbounded = PlayedMemory()
    unbounded.used = 1 << 40
    StalledSubscribers(unbounded, tmp_path / "subscribe", frozenset(), orders.append).relieve_memory()
    assert orders == [True, False]


@pytest.fixture(params=[False, True], ids=["plain", "keys"])
def keys(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    """A directory of keys, or none."""
    if not request.param:
        return None
    (tmp_path / "keys").mkdir()
    list(write_keys(tmp_path / "keys", ROLES))
    return tmp_path / "keys"


def ends(directory: Path, keys: Path | None) -> BusEnds:
    """Ends of the bus that may publish datagrams."""
    return BusEnds(directory, open_link(Bus(keys=str(keys)), "ingest") if keys else DIRECT)


def test_what_is_held_waits_at_its_publisher(tmp_path: Path, keys: Path | None) -> None:
    """While messages are held none passes, the publisher is refused, and then all that it was not refused comes."""
    directory = tmp_path / "bus"
    with Proxy(directory, 8, keys=keys) as proxy, ends(directory, keys) as bus:
        publisher, live = bus.publisher(high_water_mark=8), bus.subscriber(TOPIC)
        wait_wanted(publisher, TOPIC)
        assert publisher.publish(TOPIC, BODY, BATCH)
        assert take_all(live, len(BATCH)) == len(BATCH)
        for held in range(1, 3):
            proxy._hold(True)
            before = proxy.statistics()
            wait_until(lambda: not publisher.publish(TOPIC, BODY, BATCH), "the publisher is refused")
            sent = publisher._numbering[TOPIC].total
            assert sent > held * len(BATCH)
            assert live.receive() is None
            assert proxy.statistics() == before
            proxy._hold(False)
            take_all(live, sent)
        after = proxy.statistics()
        assert list(discrepancies({"broker": after})) == []
        assert after["from_publishers"] == 5 * sent // len(BATCH)  # parts of a message


def test_flood_into_stalled_subscribers(stack: Stack, keys: Path | None) -> None:
    """A flood while twenty stop reading, one after another: the broker stays below its ceiling and serves who comes."""
    stack.configure((f'keys = "{keys}"\n' if keys else "") + f"[broker]\nmemory = {CEILING}\n")
    broker = stack.start("broker")
    with ends(stack.bus, keys) as bus:
        publisher = bus.publisher(high_water_mark=16)
        bus.subscriber(TOPIC)  # it too reads only at the end
        wait_wanted(publisher, TOPIC)
        sent = 0
        for _ in range(STALLED):
            stall(bus, publisher)
            until = time.monotonic() + 0.1
            while time.monotonic() < until:
                if publisher.publish(TOPIC, BODY, BATCH):
                    sent += len(BATCH)
                else:
                    time.sleep(0.0005)
        live = bus.subscriber(TOPIC)
        wait_until(publisher.new_subscriptions, "the last subscriber is seen")
        wait_until(lambda: publisher.publish(TOPIC, BODY, BATCH), "the bus takes messages again")
        assert take_all(live, sent + len(BATCH))
    assert broker.resident_mb("VmHWM") * 2**20 < CEILING
