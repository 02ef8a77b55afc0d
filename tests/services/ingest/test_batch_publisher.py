import signal
from collections import Counter

from services.ingest.batch_publisher import StreamFeed
from shared.process.memory import Memory
from tests.builders import BusEnds, freeze, take_mark, wait_wanted
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
