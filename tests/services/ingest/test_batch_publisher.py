import signal
from collections import Counter
from collections.abc import Sequence
from typing import cast

import numpy as np
import pytest
from structlog.testing import capture_logs

from services.ingest.batch_publisher import StreamFeed
from services.ingest.flows.exporters import ExporterTracker
from shared.bus.loans.lender import Loan
from shared.bus.messages import MAX_MESSAGE, Datagrams, Part
from shared.bus.publishing.held_batches import HeldBatches
from shared.bus.zmq_sockets import Publisher
from shared.datagrams.batch import DatagramBatch
from shared.process.memory import Memory
from tests.builders import BusEnds, freeze, make_batch, take_mark, wait_wanted
from tests.services.ingest.flows.exported import netflow_v9
from tests.services.ingest.flows.test_sequence_gaps import batch_of
from tests.stack import Stack, wait_until


def test_worker_without_memory_drops_what_comes(stack: Stack) -> None:
    """Near its ceiling ingest puts nothing on the bus, which is counted, and goes on as soon as there is room."""
    stack.start("broker")
    account: Counter[str] = Counter()
    with BusEnds(stack.bus) as bus:
        publisher, memory = bus.publisher(), Memory()
        bus.subscriber("datagrams/messages/")
        feed = StreamFeed("messages", publisher, account, memory=memory)
        wait_wanted(publisher, feed.topic)
        memory.short = True
        assert not feed.receive(3, 300)
        memory.short = False
        assert feed.receive(2, 200)
    assert account == {"received": 5, "bytes": 500, "dropped_memory": 3}


def test_mark_that_the_bus_refuses_is_owed(stack: Stack) -> None:
    """A mark for which the bus has no room is owed until there is: who waits for it could not borrow without."""
    broker = stack.start("broker")
    with BusEnds(stack.bus) as bus:
        publisher = bus.publisher(high_water_mark=1)
        subscriber = bus.subscriber("datagrams/messages/")
        feed = StreamFeed("messages", publisher, Counter())
        wait_wanted(publisher, feed.topic)

        def owed() -> bool:
            feed.mark(0)
            return feed.owing

        freeze(broker)
        wait_until(lambda: any(owed() for _ in range(100)), "the bus is full")
        broker.process.send_signal(signal.SIGCONT)
        wait_until(lambda: not owed(), "the bus takes it")
        take_mark(subscriber)


class NoBus:
    """A bus on which nobody listens."""

    sender = "ingest.1"

    def wanted(self, _topic: str) -> bool:
        """Return False."""
        return False

    def publish(self, *_: object) -> bool:
        """Take what nobody wants."""
        return True


@pytest.mark.parametrize("when", ["observe", "settle", "kept_templates"])
def test_a_fault_in_following_exporters_costs_no_copies(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A datagram that brings out a fault of ours ends nothing: it is counted, told, and exporters are followed anew."""
    account: Counter[str] = Counter()
    feed = StreamFeed("flows", cast(Publisher, NoBus()), account)
    feed.look_for("netflow")
    known = feed.exporters

    def fail(*_: object, **__: object) -> None:
        raise KeyError(7)

    with monkeypatch.context() as patch, capture_logs() as lines:
        patch.setattr(ExporterTracker, when, fail)
        feed.observe(batch_of([("192.0.2.1", netflow_v9(1))] * 3))
        feed.settle()
        feed.greet(("templates/flows/",))
    assert [line["event"] for line in lines] == [
        "can't follow exporters: they are followed anew; please report this fault"
    ]
    assert account["exporter_unread"] == (3 if when == "observe" else 0)
    assert feed.exporters is not known
    feed.observe(batch_of([("192.0.2.1", netflow_v9(number)) for number in (1, 3)]))
    feed.settle(at_once=True)
    assert account["exporter_missed"] == 1


class Bus:
    """A publisher that remembers the payloads of what it was given, and of what was handed on, with their totals."""

    sender = "ingest.1"

    def __init__(self) -> None:
        self.published: list[tuple[int, bytes]] = []
        self.handed_on: list[tuple[int, bytes]] = []
        self.lent = self.total = 0

    def publish(self, _topic: str, body: Datagrams, batch: DatagramBatch) -> bool:
        """Take a batch; what is lent takes no room."""
        self.published.append((self.total, batch.packed()))
        self.lent += body.chunk is not None
        self.total += len(batch)
        return True

    def repeat(self, _topic: str, _body: Datagrams, _sequence: int, total: int, arrays: Sequence[Part]) -> bool:
        """Take what was held."""
        self.handed_on.append((total, bytes(arrays[1])))
        return True

    def position(self, _topic: str) -> tuple[int, int]:
        """Return the numbers of what was published."""
        return len(self.published), self.total

    def wanted(self, topic: str) -> bool:
        """Return whether somebody subscribes."""
        return not topic.startswith("inline/")


@pytest.mark.parametrize(
    ("count", "size", "stride", "parts"), [(1024, 1400, 0, 3), (1024, 1400, 2048, 3), (512, 200, 2048, 0)]
)
def test_what_is_held_for_a_journal_fits_into_messages(count: int, size: int, stride: int, parts: int) -> None:
    """Datagrams of one receive call that are more than a message of the bus are published, and held, in several."""
    bus = Bus()
    held = HeldBatches(cast(Publisher, bus), 256)
    feed = StreamFeed("flows", cast(Publisher, bus), Counter(), held=held)
    held.note_journaled({"flows"})
    held.heed(["hold/journal.1/"], ["flows"])
    payloads = [b"%d" % number + bytes(size - len(b"%d" % number)) for number in range(count)]
    memory = b"".join(payload.ljust(stride or size, b"?") for payload in payloads)
    rows, generations = make_batch(payloads).rows, np.arange(count, dtype=np.uint16)
    feed.publish(1, rows, memory, Loan(1, 0, memoryview(bytearray(1))), stride, generations)
    held.heed(["again/ingest.1/journal.1/"], [])
    held.hand_on(short=False)
    *batches, _ = bus.handed_on
    assert b"".join(payload for _, payload in batches) == b"".join(payloads)
    assert batches == bus.published
    assert [total for total, _ in batches] == [
        sum(len(each) // size for _, each in batches[:n]) for n in range(len(batches))
    ]
    assert (len(batches), bus.lent) == ((parts, 0) if parts else (1, 1))
    assert max(len(payload) for _, payload in batches) <= MAX_MESSAGE
    assert feed.account["published"] == count
