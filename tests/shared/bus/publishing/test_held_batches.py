from collections.abc import Sequence
from typing import Any, cast

from shared.bus.messages import Again, Datagrams, Part, again_topic, hold_topic
from shared.bus.publishing import held_batches
from shared.bus.publishing.held_batches import BATCH_OVERHEAD, HOLD_SECONDS, MAX_SENDERS, HeldBatches
from shared.bus.zmq_sockets import Publisher

HOLD, AGAIN = hold_topic("forwarder.1"), again_topic("ingest.1", "forwarder.1")


class Bus:
    """A worker's publisher, which takes `room` messages more, and its clock."""

    def __init__(self) -> None:
        self.sender, self.room, self.now, self.total = "ingest.1", 1000, 50.0, 0
        self.subscribed = True
        self.taken: list[tuple[str, int, int, bytes]] = []
        """Topic, total, batches left, and payload of what was handed on."""
        self.held = HeldBatches(cast(Publisher, self), 8, lambda: self.now)

    def position(self, _topic: str) -> tuple[int, int]:
        """Return the numbers of what was published."""
        return self.total, self.total

    def repeat(self, topic: str, body: Any, _sequence: int, total: int, arrays: Sequence[Part]) -> bool:
        """Take a message, if there is room."""
        assert isinstance(body, Again)
        self.room -= 1
        if self.room >= 0:
            self.taken.append((topic, total, body.left, bytes(arrays[1])))
        return self.room >= 0

    def wanted(self, _topic: str) -> bool:
        """Return whether a subscription stands."""
        return self.subscribed

    def publish(self, *payloads: bytes, stream: str = "messages") -> None:
        """Publish datagrams, one a batch."""
        for payload in payloads:
            self.total += 1
            if self.held.due_at:
                self.held.add(Datagrams(stream, 0), 1, b"row", payload)

    def ask(self, *prefixes: str, short: bool = False) -> list[bytes]:
        """Let these subscriptions come; return what is handed on then, an end of a portion as the number left."""
        before = len(self.taken)
        self.held.heed(prefixes, ["messages"])
        self.held.hand_on(short=short)
        return [payload or b"%d left" % left for _, _, left, payload in self.taken[before:]]


def test_what_is_published_during_a_restart_is_handed_on_in_portions() -> None:
    """From the end of a sender on, batches of its streams are held; its successor gets them, and then no more."""
    bus = Bus()
    bus.publish(b"before")
    assert not bus.held.wants("messages")
    bus.ask(HOLD)
    assert bus.held.wants("messages")
    assert bus.held.due_at == bus.now + HOLD_SECONDS
    bus.publish(b"a", b"b", b"c")
    bus.publish(b"x", stream="other")
    assert bus.ask(AGAIN) == [b"a", b"b", b"1 left"]
    bus.publish(b"d")
    assert bus.ask() == []
    assert bus.ask(AGAIN) == [b"c", b"d", b"0 left"]
    assert [total for _, total, _, payload in bus.taken if payload] == [1, 2, 3, 5]
    assert {topic for topic, *_ in bus.taken} == {AGAIN}
    assert not bus.held.wants("messages")
    assert bus.ask(AGAIN) == [b"0 left"]


def test_each_sender_gets_what_was_held_for_it() -> None:
    """A successor that ends at once has a name of its own, and its successor gets what came since."""
    bus = Bus()
    bus.ask(HOLD)
    bus.publish(b"a")
    bus.ask(hold_topic("forwarder.2"))
    bus.publish(b"b")
    assert bus.ask(AGAIN) == [b"a", b"b", b"0 left"]
    assert bus.ask(again_topic("ingest.1", "forwarder.2")) == [b"b", b"0 left"]
    assert bus.held.due_at is None


def test_full_queue_delays_what_is_handed_on() -> None:
    """A refused batch is handed on a moment later, and so is the end."""
    bus = Bus()
    bus.ask(HOLD)
    bus.publish(b"a", b"b")
    bus.room = 1
    assert bus.ask(AGAIN) == [b"a"]
    assert cast(float, bus.held.due_at) < bus.now + 1
    bus.room = 1
    assert bus.ask() == [b"b"]
    bus.room = 1
    assert bus.ask() == [b"0 left"]


def test_what_is_held_has_bounds() -> None:
    """Nobody comes, memory is short, or there is too much: the oldest go. Of many senders the last get nothing."""
    bus = Bus()
    bus.ask(HOLD)
    bus.publish(b"a")
    bus.now += HOLD_SECONDS
    bus.ask()
    assert bus.held.due_at is None
    bus.ask(HOLD)
    bus.publish(b"a")
    assert bus.ask(AGAIN, short=True) == [b"0 left"]
    bus.ask(HOLD)
    big = bytes(held_batches.MAX_HELD // 2 - BATCH_OVERHEAD - 3)
    bus.publish(b"a", big, big)
    assert bus.ask(AGAIN) + bus.ask(AGAIN) == [big, b"1 left", big, b"0 left"]  # each takes many places of a queue
    bus.ask(HOLD, *(hold_topic(f"forwarder.{number}") for number in range(2, 2 + MAX_SENDERS)))
    bus.publish(b"a")
    assert bus.ask(again_topic("ingest.1", f"forwarder.{1 + MAX_SENDERS}")) == []
    assert bus.ask(AGAIN) == [b"a", b"0 left"]


def test_the_latest_batches_stand_for_a_journal() -> None:
    """As long as it is there, and for a restart; they may be handed on again, and old ones are let go."""
    bus = Bus()
    bus.held.note_journaled({"messages"})
    bus.ask(hold_topic("journal.1"))
    assert not bus.held.whole
    bus.publish(b"a", b"b", b"c")
    bus.publish(b"x", stream="other")
    again = again_topic("ingest.1", "journal.1")
    assert bus.ask(again) == [b"a", b"b", b"1 left"]
    assert bus.ask(hold_topic("journal.1"), again) == [b"a", b"b", b"1 left"]  # the first asker was killed
    assert bus.ask(again) == [b"c", b"0 left"]
    bus.now += HOLD_SECONDS / 2
    bus.publish(b"d")
    assert bus.ask(again) == [b"a", b"b", b"2 left"]
    assert bus.ask(again) == [b"c", b"d", b"0 left"]
    bus.now += HOLD_SECONDS / 2
    assert bus.ask(again) == [b"d", b"0 left"]
    bus.subscribed = False
    bus.now += HOLD_SECONDS - 1
    bus.publish(b"e")
    assert bus.ask() == []
    assert bus.held.wants("messages")
    bus.now += 1
    bus.ask()
    assert not bus.held.wants("messages")
    assert bus.held.due_at is None
