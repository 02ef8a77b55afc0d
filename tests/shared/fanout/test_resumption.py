from collections.abc import Sequence
from typing import Any, cast

from structlog.testing import capture_logs

from shared.bus.kept_counts import KeptFile
from shared.bus.messages import Again, Datagrams, Envelope, Message, Status, again_topic, hold_topic
from shared.bus.zmq_sockets import Subscriber
from shared.fanout.resumption import MAX_WAITING, PATIENCE_SECONDS, Resumption
from tests.builders import make_batch

FIRST, SECOND = ("ingest.1", 7), ("ingest.2", 8)


class Successor:
    """A sender that follows another one, its subscriptions and its clock."""

    def __init__(self) -> None:
        self.now = 10.0
        self.subscriptions: list[str] = []
        self.resumption = Resumption("forwarder.1", cast(Subscriber, self), KeptFile(None).new_counts, lambda: self.now)
        self.resumption.begin([FIRST, SECOND], {"resumption/": {"key": 0xABC}})

    def subscribe(self, prefix: str) -> None:
        """Note it."""
        self.subscriptions.append(prefix)

    def unsubscribe(self, prefix: str) -> None:
        """Note that it ends."""
        self.subscriptions.remove(prefix)

    def hear(self, worker: tuple[str, int], body: Any, *payloads: bytes) -> list[str]:
        """Let a message come; return what is handled then."""
        topic = "again/" if isinstance(body, Again) else "datagrams/messages/"
        batch = make_batch(payloads) if isinstance(body, Datagrams) else None
        message = Message(topic, Envelope(1, "", *worker, 0, 0), body, batch)
        return names(self.resumption.order(message))


def names(messages: Sequence[Message]) -> list[str]:
    """Return the payloads of messages, or their kinds."""
    return [bytes(each.batch.payload).decode() if each.batch else type(each.body).__name__ for each in messages]


LIVE, STATUS = Datagrams("messages", 0), Status("ingest.1", 1, 0, 1, 0, 1, {})
HELD, MORE, END = Again("messages", 0), Again("end", 0, left=3), Again("end", 0)


def test_what_was_held_goes_first() -> None:
    """A worker's messages wait until it has handed on what it has held; another one's do not."""
    successor = Successor()
    assert successor.hear(FIRST, LIVE, b"new") == []
    assert successor.hear(FIRST, STATUS) == []
    assert successor.hear(FIRST, HELD, b"held") == ["held"]
    assert successor.hear(FIRST, MORE) == []
    assert sorted(successor.subscriptions) == [again_topic(name, "forwarder.1.abc") for name, _ in (FIRST, SECOND)]
    assert successor.hear(SECOND, END) == []
    assert successor.hear(SECOND, LIVE, b"other") == ["other"]
    assert successor.hear(FIRST, HELD, b"rest") == ["rest"]
    with capture_logs() as logs:
        assert successor.hear(FIRST, END) == ["new", "Status"]
    assert [(line["event"], line["datagrams"]) for line in logs] == [
        ("copies go on where the last process has stopped", 2)
    ]
    assert successor.hear(FIRST, LIVE, b"newer") == ["newer"]
    assert successor.hear(FIRST, HELD, b"late") == []
    assert successor.subscriptions == []


def test_nobody_is_waited_for_too_long() -> None:
    """A worker that has ended hands on nothing: after a while, or with too much that waits, others go on."""
    successor = Successor()
    assert successor.hear(FIRST, LIVE, b"new") == []
    assert names(successor.resumption.overdue()) == []
    successor.now += PATIENCE_SECONDS
    assert names(successor.resumption.overdue()) == ["new"]
    assert successor.hear(FIRST, LIVE, b"newer") == ["newer"]
    successor = Successor()
    came = [each for _ in range(MAX_WAITING + 1) for each in successor.hear(FIRST, LIVE, b"x")]
    assert came == ["x"] * (MAX_WAITING + 1)


def test_end_of_a_sender_asks_for_its_successor() -> None:
    """A sender that ends asks all workers to hold batches, by a name that it leaves to its successor alone."""
    successor = Successor()
    successor.subscriptions.clear()
    successor.resumption.hand_over([FIRST, SECOND])
    (kept,) = successor.resumption.tables().values()
    assert hold_topic(f"forwarder.1.{kept['key']:x}") in successor.subscriptions
    assert kept != Successor().resumption.tables()["resumption/"]
    assert not successor.resumption.handed_over([FIRST, SECOND])
    for worker in (FIRST, SECOND):
        (asked,) = (each for each in successor.subscriptions if each.startswith(f"again/{worker[0]}/"))
        message = Message(asked, Envelope(1, "", *worker, 0, 0), END, None)
        assert successor.resumption.order(message) == ()
        assert successor.resumption.handed_over([FIRST])
        assert successor.resumption.handed_over([SECOND]) == (worker == SECOND)


def test_one_that_has_handed_on_all_leaves_room_for_others() -> None:
    """The messages of a worker that need not wait any more count no longer: another one is waited for all the same."""
    successor = Successor()
    for worker in (FIRST, SECOND):
        assert [successor.hear(worker, LIVE, b"new") for _ in range(MAX_WAITING // 2)] == [[]] * (MAX_WAITING // 2)
        if worker == FIRST:
            assert len(successor.hear(FIRST, END)) == MAX_WAITING // 2
    assert [successor.hear(SECOND, LIVE, b"new") for _ in range(9)] == [[]] * 9
    assert successor.hear(SECOND, HELD, b"held") == ["held"]
    assert len(successor.hear(SECOND, END)) == MAX_WAITING // 2 + 9
