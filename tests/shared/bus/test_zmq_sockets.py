import gc
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import msgpack
import pytest
import zmq

from shared.bus.continuity import Continuity
from shared.bus.endpoint import ipc_endpoint
from shared.bus.messages import (
    MAX_MESSAGE,
    MAX_TOPIC,
    Datagrams,
    Message,
    ServeReply,
    ServeRequest,
    datagrams_topic,
    inline_topic,
)
from shared.bus.publishing import subscriptions
from shared.bus.zmq_sockets import (
    HELLO_TOPIC,
    MAX_SUBSCRIPTION,
    SUBSCRIPTIONS_MAX,
    Publisher,
    Requests,
    Subscriber,
    broker_is_up,
    check_directory,
    prepare_directory,
)
from shared.process.lifecycle import OperatorError
from tests.builders import (
    BusEnds,
    freeze,
    kill_all,
    make_batch,
    make_envelope,
    take,
    take_datagrams,
    take_mark,
    wait_unwanted,
    wait_wanted,
)
from tests.shared.bus.loans.lending import LendingWorker, PoolClock
from tests.stack import Stack, wait_until

TOPIC = datagrams_topic("messages")
BODY = Datagrams("messages", 0)


@pytest.fixture
def stack(stack: Stack) -> Iterator[Stack]:
    """The stack, ended at once when a test is over."""
    yield stack
    kill_all(stack)


def publish(publisher: Publisher, *payloads: bytes) -> bool:
    """Publish a batch of these payloads."""
    return publisher.publish(TOPIC, BODY, make_batch(list(payloads)))


def drain(subscriber: Subscriber, seconds: float = 0.3) -> list[Message]:
    """Everything that comes until nothing has come for a while."""
    found: list[Message] = []
    quiet_at = time.monotonic() + seconds
    while time.monotonic() < quiet_at:
        if message := subscriber.receive():
            found.append(message)
            quiet_at = time.monotonic() + seconds
        else:
            subscriber.socket.poll(20)
    return found


def payloads_of(messages: list[Message]) -> list[bytes]:
    """The payloads of every batch, in order."""
    return [payload for message in messages if message.batch for _, _, payload in message.batch.datagrams()]


def test_message_goes_to_who_subscribed(stack: Stack) -> None:
    """A message arrives with its envelope and columns at those who subscribed to its topic, and nowhere else."""
    stack.start("broker")
    with BusEnds(stack.bus) as bus:
        publisher = bus.publisher("ingest.2")
        wanting, other = bus.subscriber("datagrams/"), bus.subscriber("registry/", "datagrams/messages.old/")
        wait_wanted(publisher, TOPIC)
        assert publish(publisher, b"one", b"")
        assert publish(publisher, b"two")
        first, second = take(wanting), take(wanting)
        assert payloads_of([first, second]) == [b"one", b"", b"two"]
        assert first.envelope == make_envelope(0, 0, boot=publisher.boot, sender="ingest.2")
        assert second.envelope == make_envelope(1, 2, boot=publisher.boot, sender="ingest.2")
        assert other.receive() is None


def test_numbering_is_by_topic(stack: Stack) -> None:
    """Sequence and running count of each topic are its own, so that a subscriber to one sees no gap."""
    stack.start("broker")
    with BusEnds(stack.bus) as bus:
        publisher, subscriber = bus.publisher(), bus.subscriber(datagrams_topic("traps"))
        wait_wanted(publisher, datagrams_topic("traps"))
        publish(publisher, b"x")
        publisher.publish(datagrams_topic("traps"), Datagrams("traps", 0), make_batch([b"y"], stream="traps"))
        envelope = take(subscriber).envelope
        assert (envelope.sequence, envelope.total) == (0, 0)


def test_late_subscriber_is_seen_although_somebody_subscribed_before(stack: Stack) -> None:
    """Every subscription is told to the publisher, repeated ones too, so each late subscriber gets its snapshot."""
    stack.start("broker")
    with BusEnds(stack.bus) as bus:
        publisher = bus.publisher()
        for _ in range(3):
            bus.subscriber("registry/")
            wait_until(lambda: "registry/" in publisher.new_subscriptions(), "the subscription is seen")


def test_wanted_follows_the_subscriptions(stack: Stack) -> None:
    """A topic is wanted from the first subscription to a prefix of it until that is taken back."""
    stack.start("broker")
    with BusEnds(stack.bus) as bus:
        publisher = bus.publisher()
        wait_until(lambda: (publisher.new_subscriptions(), publisher.ready)[1], "the broker is observed")
        assert not publisher.wanted(TOPIC)
        subscriber = bus.subscriber("datagrams/")
        wait_wanted(publisher, TOPIC)
        assert not publisher.wanted("registry/")
        subscriber.unsubscribe("datagrams/")
        wait_unwanted(publisher, TOPIC)


def test_topic_is_unwanted_when_its_last_subscriber_is_gone(stack: Stack) -> None:
    """With several subscribers of one topic it is wanted until the last has gone, and no longer."""
    stack.start("broker")
    with BusEnds(stack.bus) as bus:
        publisher = bus.publisher()
        subscribers = []
        for _ in range(3):
            subscribers.append(bus.subscriber(TOPIC))
            wait_until(lambda: TOPIC in publisher.new_subscriptions(), "the subscription is seen")
        subscribers.pop().close()
        subscribers.pop().close()
        publish(publisher, b"x")
        assert take_datagrams(subscribers[0], 1)
        publisher.new_subscriptions()
        assert publisher.wanted(TOPIC)
        subscribers.pop().close()
        wait_unwanted(publisher, TOPIC)


def test_full_queue_refuses_and_loses_nothing(stack: Stack) -> None:
    """`publish` is refused at the high-water mark when the broker does not read, and all it took arrives later."""
    broker = stack.start("broker")
    with BusEnds(stack.bus) as bus:
        publisher, subscriber = bus.publisher(high_water_mark=20), bus.subscriber(TOPIC)
        wait_wanted(publisher, TOPIC)
        freeze(broker)
        took = [number for number in range(200) if publish(publisher, b"%d" % number + bytes(60_000))]
        assert 20 <= len(took) < 200
        assert took == list(range(len(took)))
        broker.process.send_signal(signal.SIGCONT)
        arrived = take_datagrams(subscriber, len(took))
        assert [int(payload.rstrip(b"\0")) for _, _, payload in arrived] == took
        assert publish(publisher, b"200")
        message = take(subscriber)
        assert (message.envelope.sequence, message.envelope.total) == (len(took), len(took))


def test_garbage_costs_itself_and_nothing_else(stack: Stack) -> None:
    """Garbage on every topic is counted under its cause; good messages go through."""
    stack.start("broker")
    garbage = {
        "malformed": [[b""], [b"", b"\xc1", b""], [b"\x80" * 100] * 2, [b"x"] * 1000],
        "bad_version": [[msgpack.packb([2, "datagrams", "x.1", 1, 0, 0]), b"", b"", b""]],
        "unknown_kind": [[msgpack.packb([1, "colour", "x.1", 1, 0, 0]), b""]],
    }
    topics = [b"datagrams/messages/", b"registry/", b"serve/", b"status/ingest.1/", b"broker/", b"reply/x/"]
    with BusEnds(stack.bus) as bus:
        publisher, subscriber = bus.publisher(), bus.subscriber("")
        with bus.context.socket(zmq.XPUB) as vandal:
            vandal.connect(ipc_endpoint(stack.bus, "publish"))
            vandal.recv()
            wait_wanted(publisher, TOPIC)
            for topic in topics:
                for messages in garbage.values():
                    for rest in messages:
                        vandal.send_multipart([topic, *rest])
                publish(publisher, topic)
            expected = {cause: len(topics) * len(messages) for cause, messages in garbage.items()}
            found: list[Message] = []

            def counted() -> bool:
                found.extend(filter(None, [subscriber.receive()]))
                return subscriber.rejected == expected

            wait_until(counted, f"{expected} rejected; so far {subscriber.rejected}")
            found += drain(subscriber)
        assert payloads_of(found) == topics


def test_overlong_part_costs_its_sender_alone(stack: Stack) -> None:
    """A part beyond the limit disconnects who sent it; it never arrives, and everybody else goes on."""
    stack.start("broker")
    with BusEnds(stack.bus) as bus:
        publisher, subscriber = bus.publisher(), bus.subscriber(TOPIC)
        with bus.context.socket(zmq.XPUB) as vandal:
            vandal.connect(ipc_endpoint(stack.bus, "publish"))
            wait_wanted(publisher, TOPIC)
            vandal.recv()
            vandal.send_multipart([TOPIC.encode(), bytes(MAX_MESSAGE + 1)], zmq.NOBLOCK)
            vandal.recv()  # disconnected, it has reconnected and is told the subscriptions anew
            assert publish(publisher, b"good")
            assert payloads_of(drain(subscriber)) == [b"good"]
        assert subscriber.rejected == {}


def test_longest_batch_passes(stack: Stack) -> None:
    """The largest batch that the limits allow is within the bus's own."""
    stack.start("broker")
    with BusEnds(stack.bus) as bus:
        publisher, subscriber = bus.publisher(), bus.subscriber(TOPIC)
        wait_wanted(publisher, TOPIC)
        payloads = [bytes([number]) * 65507 for number in range(8)]
        assert publish(publisher, *payloads)
        assert [payload for _, _, payload in take_datagrams(subscriber, 8)] == payloads


def test_killed_broker_is_found_again_and_the_gap_is_exact(stack: Stack) -> None:
    """After SIGKILL and restart both ends find each other, and what was lost is what continuity says."""
    broker = stack.start("broker")
    with BusEnds(stack.bus) as bus:
        publisher, subscriber = bus.publisher(), bus.subscriber(TOPIC)
        wait_wanted(publisher, TOPIC)
        continuity, came, sent = Continuity(), 0, 0

        def send(*payloads: bytes) -> bool:
            nonlocal sent
            taken = publish(publisher, *payloads)
            sent += taken * len(payloads)
            return taken

        def receive() -> int:
            nonlocal came
            while message := subscriber.receive():
                assert message.batch is not None
                assert continuity.observe(TOPIC, message.envelope, len(message.batch)) is not None
                came += len(message.batch)
            return came

        for _ in range(100):
            send(b"x", b"y", b"z")
        wait_until(lambda: receive() == 300, "all that was published comes")
        freeze(broker)
        for _ in range(10):
            send(b"lost with the broker")
        time.sleep(0.2)  # by now they are in the broker's socket
        broker.stop(signal.SIGKILL)
        while send(b"queued"):
            pass
        stack.start("broker")
        wait_until(lambda: (send(b"x"), receive() > 300)[1], "datagrams come again")
        send(b"last")
        (position,) = continuity.positions.values()
        wait_until(lambda: (receive(), position.reached == sent)[1], "the last one comes")
        assert position.baseline == 0
        assert position.taken == came
        assert 10 <= position.missed == sent - came


def test_a_broker_that_is_gone_wants_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A publisher without a broker is not ready; what the next one does not ask for is wanted no more."""
    monkeypatch.setattr(subscriptions, "CHECK_SECONDS", 0.0)
    monkeypatch.setattr(subscriptions, "RENEW_SECONDS", 0.2)
    with BusEnds(tmp_path) as bus:
        publisher = bus.publisher()

        def until(met: Callable[[], bool], what: str) -> None:
            wait_until(lambda: (played_broker.poll(0), publisher.new_subscriptions(), met())[2], what)

        for prefixes in (("datagrams/a/", "inline/a/"), ("datagrams/a/",)):
            with bus.context.socket(zmq.XSUB) as played_broker:
                played_broker.bind(ipc_endpoint(tmp_path, "publish"))
                for prefix in (*prefixes, HELLO_TOPIC):
                    played_broker.send(b"\x01" + prefix.encode())
                until(lambda: publisher.ready, "a broker is observed")
                lends = "inline/a/" not in prefixes
                until(partial(lambda lends: publisher.wanted("inline/a/") != lends, lends), "that alone is wanted")
                assert publisher.wanted("datagrams/a/")
            wait_until(lambda: (publisher.new_subscriptions(), not publisher.ready)[1], "it is gone")
            assert publisher.wanted("datagrams/a/")


def test_hostile_subscriptions_are_bounded(tmp_path: Path) -> None:
    """A subscriber to thousands of topics takes a bounded place, and what was wanted before stays wanted."""
    with BusEnds(tmp_path) as bus, bus.context.socket(zmq.XSUB) as played_broker:
        played_broker.set(zmq.SNDHWM, 0)
        played_broker.bind(ipc_endpoint(tmp_path, "publish"))
        publisher = bus.publisher()
        played_broker.send(b"\x01" + TOPIC.encode())
        wait_until(
            lambda: (played_broker.poll(0), publisher.new_subscriptions(), publisher.wanted(TOPIC))[2], "it is seen"
        )
        for number in range(SUBSCRIPTIONS_MAX + 100):
            played_broker.send(b"\x01x%d/" % number)
        played_broker.send(b"\x00x0/")
        seen: set[str] = set()

        def all_seen() -> bool:
            seen.update(publisher.new_subscriptions())
            return "x9/" in seen and not publisher.wanted("x0/")

        wait_until(all_seen, "they are seen")
        assert len(seen) == SUBSCRIPTIONS_MAX - 1
        assert publisher.wanted(TOPIC)
        assert not publisher.wanted(f"x{SUBSCRIPTIONS_MAX}/")


def test_slow_subscriber_costs_itself_alone(stack: Stack) -> None:
    """A subscriber that does not read loses what has no room, and sees exactly how much; another one misses nothing."""
    stack.configure("high_water_mark = 20\n")
    stack.start("broker")
    with BusEnds(stack.bus) as bus:
        publisher, subscribers = bus.publisher(), list[Subscriber]()
        for _ in range(2):
            subscribers.append(bus.subscriber(TOPIC, high_water_mark=20))
            wait_until(lambda: TOPIC in publisher.new_subscriptions(), "the subscription is seen")
        quick, slow = subscribers
        for number in range(300):
            assert publish(publisher, b"%d" % number, bytes(60_000))
            assert payloads_of([take(quick)])[0] == b"%d" % number
        late, continuity = drain(slow), Continuity()
        assert publish(publisher, b"300", b"last")
        late.append(take(slow))
        for message in late:
            assert continuity.observe(TOPIC, message.envelope, 2) is not None
        (position,) = continuity.positions.values()
        assert 0 < position.missed == 2 * (301 - len(late))
        assert position.taken == 2 * len(late)


HOSTILE = """
import sys, zmq
context = zmq.Context()
vandal = context.socket(zmq.SUB)
monitor = vandal.get_monitor_socket(zmq.EVENT_DISCONNECTED)
vandal.connect(sys.argv[1])
vandal.subscribe(b"x" * int(sys.argv[2]))
monitor.recv_multipart()
print("cut off", flush=True)
monitor.poll()
"""
"""In a process of its own, as libzmq's own end of it crashes when such a subscription is taken back."""


@pytest.mark.parametrize("size", [MAX_SUBSCRIPTION + 1, 1_000_000])
def test_endless_subscription_costs_its_sender_alone(stack: Stack, size: int) -> None:
    """A subscription longer than any topic disconnects who sent it; the broker stays as it was."""
    broker = stack.start("broker")
    with BusEnds(stack.bus) as bus:
        publisher, subscriber = bus.publisher(), bus.subscriber(TOPIC)
        wait_wanted(publisher, TOPIC)
        before = broker.forget_peak()
        vandal = stack.spawn("vandal", [sys.executable, "-c", HOSTILE, ipc_endpoint(stack.bus, "subscribe"), str(size)])
        vandal.wait_for("cut off")
        vandal.stop(signal.SIGKILL)
        assert publish(publisher, b"good")
        assert payloads_of([take(subscriber)]) == [b"good"]
        assert publisher.new_subscriptions() == []
        assert broker.resident_mb("VmHWM") - before < 20


def test_longest_topic_may_be_subscribed_to(stack: Stack) -> None:
    """A subscription to the longest topic there may be passes."""
    stack.start("broker")
    with BusEnds(stack.bus) as bus:
        publisher, topic = bus.publisher(), "x" * (MAX_TOPIC - 1) + "/"
        bus.subscriber(topic)
        wait_wanted(publisher, topic)


def test_subscription_that_is_no_text_is_taken_all_the_same(stack: Stack) -> None:
    """A subscription of arbitrary bytes neither ends the publisher nor makes anything wanted."""
    stack.start("broker")
    with BusEnds(stack.bus) as bus:
        publisher = bus.publisher()
        bus.subscriber().socket.subscribe(b"\xff\x00registry/")
        wait_until(lambda: any("registry/" in prefix for prefix in publisher.new_subscriptions()), "it is seen")
        assert not publisher.wanted("registry/")


def test_broker_is_up_when_it_accepts(stack: Stack) -> None:
    """A connection tells whether a broker runs: not a missing path, nor one that a killed broker left."""
    assert not broker_is_up(stack.bus)
    broker = stack.start("broker")
    assert broker_is_up(stack.bus)
    broker.stop(signal.SIGKILL)
    assert (stack.bus / "subscribe").is_socket()
    assert not broker_is_up(stack.bus)


@pytest.fixture
def pool_clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[PoolClock]:
    """The time as pools take it."""
    yield PoolClock(monkeypatch)
    gc.collect()


def large(number: int, count: int = 10) -> list[bytes]:
    """Payloads, worth lending, that are in no other batch."""
    return [b"%d.%d," % (number, row) * 1000 for row in range(count)]


def loan_of(message: Message) -> int:
    """The number of the loan that a message's payload is by, 0 when it is in the message."""
    assert isinstance(message.body, Datagrams)
    return 0 if message.body.chunk is None else message.body.loan


def test_who_meets_a_mark_borrows(stack: Stack, pool_clock: PoolClock) -> None:
    """Subscribers that met a worker's mark get large payloads lent, intact, as long as they hold them, and in turn."""
    stack.start("broker")
    with BusEnds(stack.bus) as bus, LendingWorker(bus, pool_clock) as worker:
        subscribers = [bus.subscriber(TOPIC)]
        wait_wanted(worker.publisher, TOPIC)
        subscribers.append(bus.subscriber("datagrams/"))
        wait_wanted(worker.publisher, "datagrams/others/")
        assert not worker.publish(large(0)), "lent although nobody has borrowed"
        assert [payloads_of([take(subscriber)]) for subscriber in subscribers] == [large(0)] * 2
        worker.greet()
        for subscriber in subscribers:
            take_mark(subscriber)
        worker.turn()
        held: list[Message] = []
        for number in range(1, 20):
            stride = 8000 if number % 2 else 0
            assert worker.publish(large(number), stride)
            for subscriber in subscribers:
                message = take(subscriber)
                assert loan_of(message) == number
                assert payloads_of([message]) == large(number)
                held.append(message)
            del message
            if number >= 2:  # three chunks, so two may be held
                assert payloads_of(held) == [payload for old in (number - 1, number) for payload in large(old) * 2]
                del held[:2]
        assert not worker.publish([b"small"])
        assert [payloads_of([take(subscriber)]) for subscriber in subscribers] == [[b"small"]] * 2
        held.clear()
        assert [subscriber.rejected for subscriber in subscribers] == [{}, {}]


def test_what_is_held_makes_the_rest_go_through_the_bus(stack: Stack, pool_clock: PoolClock) -> None:
    """While a subscriber holds every chunk large payloads come in messages; when it lets go they are lent again."""
    stack.start("broker")
    with BusEnds(stack.bus) as bus, LendingWorker(bus, pool_clock) as worker:
        subscriber = bus.subscriber(TOPIC)
        wait_wanted(worker.publisher, TOPIC)
        worker.greet()
        take_mark(subscriber)
        worker.turn()
        held = []
        for number in range(8):
            assert worker.publish(large(number)) == (number < 3)
            held.append(take(subscriber))
            assert (loan_of(held[-1]) > 0) == (number < 3)
        assert payloads_of(held) == [payload for number in range(8) for payload in large(number)]
        held.clear()
        assert worker.publish(large(8))
        assert payloads_of([take(subscriber)]) == large(8)


def test_who_can_not_borrow_has_payloads_sent(stack: Stack, pool_clock: PoolClock) -> None:
    """A subscriber asks for payloads in messages where nobody lends, and from then on nothing is lent to anybody."""
    stack.start("broker")
    with BusEnds(stack.bus) as bus, LendingWorker(bus, pool_clock) as worker:
        first = bus.subscriber(TOPIC)
        wait_wanted(worker.publisher, TOPIC)
        worker.greet()
        take_mark(first)
        worker.turn()
        assert worker.publish(large(0))
        assert payloads_of([take(first)]) == large(0)
        worker.path.rename(worker.path.with_name("elsewhere"))
        second = bus.subscriber(TOPIC)
        wait_until(lambda: TOPIC in worker.publisher.new_subscriptions(), "the second is seen")
        worker.feed.mark(0)
        take_mark(first)
        take_mark(second)
        wait_wanted(worker.publisher, inline_topic("messages"))
        pool_clock.pass_grace()
        assert not worker.publish(large(1))
        assert [payloads_of([take(each)]) for each in (first, second)] == [large(1)] * 2
        assert (first.rejected, second.rejected) == ({}, {})
        second.close()
        wait_unwanted(worker.publisher, inline_topic("messages"))
        assert worker.publish(large(2))
        assert payloads_of([take(first)]) == large(2)


def test_nothing_is_lent_while_somebody_new_may_not_have_borrowed(stack: Stack, pool_clock: PoolClock) -> None:
    """For a moment after each mark payloads go in the messages, so that who has just subscribed loses none."""
    stack.start("broker")
    with BusEnds(stack.bus) as bus, LendingWorker(bus, pool_clock) as worker:
        first = bus.subscriber(TOPIC)
        wait_wanted(worker.publisher, TOPIC)
        worker.greet()
        take_mark(first)
        worker.turn()
        assert worker.publish(large(0))
        assert payloads_of([take(first)]) == large(0)
        late = bus.subscriber(TOPIC)
        wait_until(lambda: TOPIC in worker.publisher.new_subscriptions(), "the late one is seen")
        worker.feed.mark(0)
        assert not worker.publish(large(1))
        for subscriber in (first, late):
            take_mark(subscriber)
            assert payloads_of([take(subscriber)]) == large(1)
        worker.turn()
        pool_clock.pass_grace()
        assert worker.publish(large(2))
        assert [payloads_of([take(each)]) for each in (first, late)] == [large(2)] * 2
        assert (first.rejected, late.rejected) == ({}, {})


def test_loan_that_can_not_be_read_is_missed(stack: Stack, pool_clock: PoolClock) -> None:
    """A loan from before a subscriber borrowed is rejected as `not_borrowed`, shows as missed, and is the last one.

    Until it can borrow payloads come in messages, and then they are lent again.
    """
    stack.start("broker")
    with BusEnds(stack.bus) as bus, LendingWorker(bus, pool_clock) as worker:
        first = bus.subscriber(TOPIC)
        wait_wanted(worker.publisher, TOPIC)
        worker.greet()
        take_mark(first)
        worker.turn()
        late, continuity = bus.subscriber(TOPIC), Continuity()
        wait_until(lambda: TOPIC in worker.publisher.new_subscriptions(), "the late one is seen")
        worker.greet()
        take_mark(first)
        for number in range(2):
            assert worker.publish(large(number))
            assert payloads_of([take(first)]) == large(number)
        mark = take(late)
        assert mark.batch is not None
        assert continuity.observe(TOPIC, mark.envelope, len(mark.batch)) == 0
        worker.turn()  # only now is it admitted
        wait_until(lambda: (late.receive(), late.rejected["not_borrowed"] == 2)[1], "both are rejected")
        wait_wanted(worker.publisher, inline_topic("messages"))
        assert not worker.publish(large(2))
        message = take(late)
        assert continuity.observe(TOPIC, message.envelope, 10) == 20
        assert payloads_of([message]) == large(2)
        wait_unwanted(worker.publisher, inline_topic("messages"))
        assert payloads_of([take(first)]) == large(2)
        assert worker.publish(large(3))
        assert [payloads_of([take(each)]) for each in (first, late)] == [large(3)] * 2
        assert late.rejected == {"not_borrowed": 2}
        assert first.rejected == {}


def test_who_has_unsubscribed_holds_nothing_up(stack: Stack, pool_clock: PoolClock) -> None:
    """After one of two subscribers has taken its subscription back the other is lent to as before."""
    stack.start("broker")
    with BusEnds(stack.bus) as bus, LendingWorker(bus, pool_clock) as worker:
        staying = bus.subscriber("datagrams/")
        wait_wanted(worker.publisher, datagrams_topic("others"))
        leaving = bus.subscriber(TOPIC)
        wait_until(lambda: TOPIC in worker.publisher.new_subscriptions(), "the other one has subscribed")
        worker.greet()
        take_mark(leaving)
        take_mark(staying)
        worker.turn()
        assert worker.publish(large(0))
        assert [payloads_of([take(each)]) for each in (leaving, staying)] == [large(0)] * 2
        leaving.unsubscribe(TOPIC)
        time.sleep(0.3)
        lent = []
        for number in range(1, 7):
            worker.turn()
            lent.append(worker.publish(large(number)))
            assert payloads_of([take(staying)]) == large(number)
        assert lent == [True] * 6


def test_restarted_worker_is_borrowed_from_anew(stack: Stack, pool_clock: PoolClock) -> None:
    """A payload lent by a worker that has ended stays as it is, and its successor's are read from its own memory."""
    stack.start("broker")
    with BusEnds(stack.bus) as bus:
        subscriber, held = bus.subscriber(TOPIC), []
        for life in range(3):
            with LendingWorker(bus, pool_clock) as worker:
                wait_wanted(worker.publisher, TOPIC)
                worker.greet()
                take_mark(subscriber)
                worker.turn()
                for number in range(3):
                    assert worker.publish(large(life * 3 + number))
                    held.append(take(subscriber))
                worker.publisher.close()
        assert payloads_of(held) == [payload for number in range(9) for payload in large(number)]
        assert [loan_of(message) for message in held] == [1, 2, 3] * 3
        held.clear()
        assert subscriber.rejected == {}


def test_loans_of_a_replaced_worker_are_not_read_from_its_successor(stack: Stack, pool_clock: PoolClock) -> None:
    """A subscriber that reads a worker's mark and loans after it was replaced misses them, and reads no others' bytes.

    Whoever reads in time misses nothing, and is lent to by the successor all the while.
    """
    stack.start("broker")
    with BusEnds(stack.bus) as bus:
        prompt, found = bus.subscriber(TOPIC), []
        with LendingWorker(bus, pool_clock) as worker:
            wait_wanted(worker.publisher, TOPIC)
            behind = bus.subscriber("datagrams/")
            wait_wanted(worker.publisher, "datagrams/others/")
            worker.greet()
            take_mark(prompt)
            worker.turn()
            for number in range(6):
                assert worker.publish(large(number))
                found.append(payloads_of([take(prompt)]))
            worker.publisher.close()
        with LendingWorker(bus, pool_clock) as worker:
            wait_wanted(worker.publisher, TOPIC)
            worker.greet()
            take_mark(prompt)
            take_mark(behind)  # the predecessor's
            worker.turn()
            for number in range(6, 9):
                assert worker.publish(large(number))
                found.append(payloads_of([take(prompt)]))
            assert drain(behind)[0].batch is not None  # the successor's mark
            assert behind.rejected == {"not_borrowed": 9}
            wait_wanted(worker.publisher, inline_topic("messages"))
            assert not worker.publish(large(9))
            assert [payloads_of([take(each)]) for each in (prompt, behind)] == [large(9)] * 2
            assert (found, prompt.rejected) == ([large(number) for number in range(9)], {})


def test_made_up_loan_is_rejected(stack: Stack, pool_clock: PoolClock) -> None:
    """A loan of a sender that lends nothing, or of a chunk there is not, costs its message and nothing else."""
    stack.start("broker")
    with BusEnds(stack.bus) as bus, LendingWorker(bus, pool_clock) as worker:
        vandal, subscriber = bus.publisher("ingest.7"), bus.subscriber(TOPIC)
        for publisher in (vandal, worker.publisher):
            wait_wanted(publisher, TOPIC)
        worker.greet()
        take_mark(subscriber)
        worker.turn()
        batch = make_batch([b"x"])
        for chunk in (0, 3, 1 << 62):
            vandal.publish(TOPIC, Datagrams("messages", 0, 1, chunk), batch)
        worker.publisher.publish(TOPIC, Datagrams("messages", 0, 1, 3), batch)
        wait_until(lambda: (subscriber.receive(), subscriber.rejected["not_borrowed"] == 4)[1], "all are rejected")
        wait_wanted(worker.publisher, inline_topic("messages"))
        worker.publish(large(0))
        assert payloads_of([take(subscriber)]) == large(0)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_request_is_answered_once(stack: Stack) -> None:
    """An answer over the bus goes to who asked, once; a second one is let go."""
    stack.start("broker")
    with BusEnds(stack.bus) as bus:
        asking, answering = bus.publisher("gateway.1"), bus.publisher("forwarder.1")
        requests = Requests("gateway.1", asking.boot)
        replies, questions = bus.subscriber(requests.topic), bus.subscriber("serve/")
        wait_wanted(asking, "serve/")
        wait_wanted(answering, requests.topic)
        got: list[Message | None] = []
        asking.publish("serve/", ServeRequest(requests.open(5, got.append), requests.topic, 7))
        question = take(questions).body
        assert isinstance(question, ServeRequest)
        for _ in range(2):
            answering.publish(question.reply, ServeReply(question.id, 7))
            message = take(replies)
            assert isinstance(message.body, ServeReply)
            requests.answer(message.body.id, message)
        requests.expire()
        assert [message.body if message else None for message in got] == [ServeReply(question.id, 7)]


def answer_to(number: int) -> Message:
    """An answer as it comes from the bus."""
    return Message("reply/", make_envelope(kind="serve.reply"), ServeReply(number, 7))


def test_request_without_an_answer_ends_at_its_deadline() -> None:
    """No answer by the deadline is None, once, and each request has its own deadline."""
    clock, short, long = Clock(), list[Message | None](), list[Message | None]()
    requests = Requests("gateway.1", 1, clock)
    requests.open(1.0, short.append)
    number = requests.open(2.0, long.append)
    clock.now += 0.9
    requests.expire()
    assert (short, long) == ([], [])
    clock.now += 0.1
    requests.expire()
    requests.expire()
    assert (short, long) == ([None], [])
    requests.answer(number, answer_to(number))
    assert long == [answer_to(number)]


def test_late_answer_is_let_go() -> None:
    """An answer after the deadline, or to nothing that was asked, calls nobody."""
    clock, got = Clock(), list[Message | None]()
    requests = Requests("gateway.1", 1, clock)
    number = requests.open(1.0, got.append)
    clock.now += 1.0
    requests.expire()
    requests.answer(number, answer_to(number))
    requests.answer(99, answer_to(99))
    assert got == [None]


def test_requests_of_a_restarted_process_have_another_topic() -> None:
    """Answers to a process that has gone do not reach its successor, which counts its requests from one again."""
    first, second = Requests("gateway.1", 1), Requests("gateway.1", 2)
    assert first.topic != second.topic
    assert first.topic.endswith("/")


@pytest.mark.parametrize(
    ("mode", "tightened"), [(0o777, 0o750), (0o755, 0o750), (0o770, 0o750), (0o750, 0o750), (0o700, 0o700)]
)
def test_wide_directory_is_tightened(tmp_path: Path, mode: int, tightened: int) -> None:
    """A bus directory keeps at most its group's right to enter."""
    directory = tmp_path / "bus"
    directory.mkdir()
    directory.chmod(mode)
    prepare_directory(directory)
    assert directory.stat().st_mode & 0o777 == tightened


def test_missing_directory_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    """A bus directory is made, with the ones above it, mode 0700."""
    prepare_directory(tmp_path / "a" / "bus")
    assert (tmp_path / "a" / "bus").stat().st_mode & 0o777 == 0o700


def test_directory_of_somebody_else_is_refused(tmp_path: Path) -> None:
    """A directory of another user is not used, and the error says what to set."""
    directory = tmp_path / "bus" if os.geteuid() == 0 else Path("/usr")
    if os.geteuid() == 0:
        directory.mkdir(mode=0o700)
        os.chown(directory, 4711, -1)
    with pytest.raises(PermissionError, match=r"owned by another user; set \[bus\] directory to one"):
        prepare_directory(directory)


def test_directory_behind_a_link_is_refused(tmp_path: Path) -> None:
    """A link is not followed: who made it could turn it elsewhere later."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(PermissionError):
        prepare_directory(tmp_path / "link")


def test_something_else_in_the_way_is_refused(tmp_path: Path) -> None:
    """A file or a socket where the directory should be ends the start with a line that names it."""
    (tmp_path / "file").write_text("")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "socket"))
        for name in ("file", "socket"):
            with pytest.raises(OperatorError, match=f"bus directory {tmp_path / name}: File exists; set "):
                prepare_directory(tmp_path / name)


@pytest.mark.parametrize("mode", [0o700, 0o750, 0o755])
def test_own_directory_is_trusted(tmp_path: Path, mode: int) -> None:
    """A bus directory of this user is used as it is found, and one that is missing is made."""
    directory = tmp_path / "bus"
    directory.mkdir()
    directory.chmod(mode)
    check_directory(directory)
    assert directory.stat().st_mode & 0o777 == mode
    check_directory(tmp_path / "new")
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700


def test_directory_anybody_may_write_to_is_not_trusted(tmp_path: Path) -> None:
    """No broker is trusted where anybody could put a socket, behind a link, or where no directory is."""
    (tmp_path / "wide").mkdir()
    (tmp_path / "wide").chmod(0o777)
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "file").write_text("")
    for name in ("wide", "link", "file"):
        with pytest.raises(PermissionError, match="owned by another user"):
            check_directory(tmp_path / name)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_somebody_elses_directory_is_trusted_by_its_group_alone(tmp_path: Path) -> None:
    """A directory that another user made is trusted when it is open to a group of ours, else not."""
    directory = tmp_path / "bus"
    directory.mkdir()
    for group, mode, trusted in ((os.getgid(), 0o750, True), (os.getgid(), 0o700, False), (4711, 0o750, False)):
        os.chown(directory, 4711, group)
        directory.chmod(mode)
        if trusted:
            check_directory(directory)
        else:
            with pytest.raises(PermissionError, match="owned by another user"):
                check_directory(directory)


def test_burst_of_subscriptions_arrives_whole(stack: Stack) -> None:
    """Far more subscriptions at once than the mark for messages all reach a publisher: nobody repeats them."""
    stack.start("broker")
    topics = [f"datagrams/s{number}/" for number in range(2000)]
    with BusEnds(stack.bus) as bus:
        publisher = bus.publisher()
        bus.subscriber(*topics)
        wait_until(lambda: (publisher.new_subscriptions(), all(map(publisher.wanted, topics)))[1], "all are wanted")
