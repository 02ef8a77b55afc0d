"""The broker under its ceiling: subscribers that stand still cost no more memory than that, and others nothing."""

import signal
import socket
import time
from pathlib import Path
from typing import Final

import pytest

from services.broker.proxy import Proxy
from services.broker.stalled_subscribers import FAR_MS, NEAR_MS, StalledSubscribers
from shared.bus.curve_keys import ROLES, write_keys
from shared.bus.endpoint import DIRECT, QUEUE_SHARE, open_link
from shared.bus.messages import Datagrams, datagrams_topic
from shared.bus.zmq_sockets import Publisher, Subscriber
from shared.ledger.accounts import Accounts
from shared.ledger.equations import discrepancies
from shared.net.sockets import enlarge_receive_buffer
from shared.process.memory import Memory
from shared.settings.tables import Bus
from tests.builders import (
    BusEnds,
    PlayedGateway,
    PlayedWorker,
    accounts_when,
    flow,
    freeze,
    make_batch,
    make_client,
    wait_wanted,
)
from tests.stack import Stack, wait_until

CEILING = 320 << 20
"""Bytes. A queue's share of it is 160 of the messages below."""
STALLED = 20
TOPIC = datagrams_topic("messages")
BODY, BATCH = Datagrams("messages", 1, 0), make_batch([bytes(64_000)] * 8)
SMALL: Final = make_batch([bytes(8000)] * 8)


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


def test_small_messages_wait_for_a_process_that_is_stopped(stack: Stack) -> None:
    """Ten seconds' worth of 200 datagrams a second, a message each, come to a sender of copies when it goes on."""
    stack.start("broker")
    forwarder = stack.start("forwarder")
    with BusEnds(stack.bus) as bus, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as collector:
        gateway, worker = PlayedGateway(bus), PlayedWorker(bus)
        enlarge_receive_buffer(collector, 4 << 20)
        collector.bind(("127.0.0.1", 0))
        collector.settimeout(60)
        flow(gateway, worker, 1, make_client("siem", collector.getsockname()[1]))
        freeze(forwarder)
        payloads = [b"%d" % number + bytes(200) for number in range(2000)]
        for payload in payloads:
            worker.publish([payload])
        forwarder.process.send_signal(signal.SIGCONT)

        def has_all(accounts: Accounts) -> bool:
            worker.report()
            return accounts["collector/siem"].get("expected") == len(payloads)

        accounts = accounts_when(bus, "forwarder.1", has_all)
        assert accounts["collector/siem"].get("missed", 0) == 0
        assert [collector.recv(1000) for _ in payloads] == payloads


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
        assert publisher.publish(TOPIC, BODY, SMALL)
        assert take_all(live, len(SMALL)) == len(SMALL)
        for held in range(1, 3):
            proxy._hold(True)
            before = proxy.statistics()
            wait_until(lambda: not publisher.publish(TOPIC, BODY, SMALL), "the publisher is refused")
            sent = publisher._numbering[TOPIC].total
            assert sent > held * len(SMALL)
            assert live.receive() is None
            assert proxy.statistics() == before
            proxy._hold(False)
            take_all(live, sent)
        after = proxy.statistics()
        assert list(discrepancies({"broker": after})) == []
        assert after["from_publishers"] == 5 * sent // len(SMALL)  # parts of a message


def test_one_that_stands_still_takes_its_share_of_the_memory(stack: Stack, keys: Path | None) -> None:
    """A queue of large messages takes a quarter of the ceiling at most; what it has no room for is dropped."""
    stack.configure((f'keys = "{keys}"\n' if keys else "") + f"[broker]\nmemory = {CEILING}\n")
    broker = stack.start("broker")
    with ends(stack.bus, keys) as bus:
        publisher, live = bus.publisher(), bus.subscriber(TOPIC)
        wait_wanted(publisher, TOPIC)
        stall(bus, publisher)
        before, sent = broker.resident_mb(), 0
        for _ in range(2 * CEILING // QUEUE_SHARE // len(BATCH.payload)):
            assert publisher.publish(TOPIC, BODY, BATCH)
            sent += len(BATCH)
            assert take_all(live, sent) == len(BATCH)
        assert broker.resident_mb("VmHWM") - before < 1.1 * CEILING / QUEUE_SHARE / 2**20
        assert not broker.events("subscriber cut off: it reads nothing, and memory is short")


def test_flood_into_stalled_subscribers(stack: Stack, keys: Path | None) -> None:
    """A flood while twenty stop reading, one after another: the broker stays below its ceiling and serves who comes."""
    stack.configure((f'keys = "{keys}"\n' if keys else "") + f"[broker]\nmemory = {CEILING}\n")
    broker = stack.start("broker")
    with ends(stack.bus, keys) as bus:
        publisher = bus.publisher(high_water_mark=128)
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
