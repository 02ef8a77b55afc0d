"""Payloads that a worker lends, over a real broker to real subscribers."""

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from shared.bus.continuity import Continuity
from shared.bus.messages import Datagrams, Message, datagrams_topic, inline_topic
from shared.bus.zmq_sockets import Subscriber
from tests.builders import (
    BusEnds,
    drain,
    kill_all,
    make_batch,
    payloads_of,
    take,
    take_mark,
    wait_unwanted,
    wait_wanted,
)
from tests.shared.bus.loans.lending import LendingWorker, PoolClock
from tests.stack import Stack, wait_until

TOPIC = datagrams_topic("messages")


@pytest.fixture
def stack(stack: Stack) -> Iterator[Stack]:
    """The stack, ended at once when a test is over."""
    yield stack
    kill_all(stack)


@pytest.fixture
def pool_clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[PoolClock]:
    """The time as pools take it."""
    yield PoolClock(monkeypatch)
    gc.collect()


def large(number: int) -> list[bytes]:
    """Payloads, worth lending, that are in no other batch."""
    return [b"%d.%d," % (number, row) * 1000 for row in range(10)]


def loan_of(message: Message) -> int:
    """The number of the loan that a message's payload is by, 0 when it is in the message."""
    assert isinstance(message.body, Datagrams)
    return 0 if message.body.chunk is None else message.body.loan


@contextmanager
def lending(stack: Stack, clock: PoolClock) -> Iterator[tuple[BusEnds, LendingWorker, Subscriber]]:
    """The test's ends of a bus, and a worker on it that lends to a subscriber."""
    stack.start("broker")
    with BusEnds(stack.bus) as bus, LendingWorker(bus, clock) as worker:
        subscriber = bus.subscriber(TOPIC)
        wait_wanted(worker.publisher, TOPIC)
        worker.admit(subscriber)
        yield bus, worker, subscriber


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
        worker.admit(*subscribers)
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
    with lending(stack, pool_clock) as (_, worker, subscriber):
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
    with lending(stack, pool_clock) as (bus, worker, first):
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
    with lending(stack, pool_clock) as (bus, worker, first):
        assert worker.publish(large(0))
        assert payloads_of([take(first)]) == large(0)
        late = bus.subscriber("datagrams/")
        wait_until(lambda: "datagrams/" in worker.publisher.new_subscriptions(), "the late one is seen")
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


def test_new_subscriber_of_a_stream_has_payloads_sent_until_it_borrows(stack: Stack, pool_clock: PoolClock) -> None:
    """It misses nothing, however late it reads the first mark, though others borrow; then payloads are lent to both."""
    with lending(stack, pool_clock) as (bus, worker, first):
        assert worker.publish(large(0))
        late = bus.subscriber(TOPIC)
        wait_until(lambda: TOPIC in worker.publisher.new_subscriptions(), "the late one is seen")
        worker.greet()
        assert not worker.publish(large(1))
        assert payloads_of([take(first), take(first), take(first)]) == large(0) + large(1)
        take_mark(late)
        assert payloads_of([take(late)]) == large(1)
        worker.admit(first, late)
        assert worker.publish(large(2))
        assert [payloads_of([take(each)]) for each in (first, late)] == [large(2)] * 2
        assert (first.rejected, late.rejected) == ({}, {})


def test_what_is_unsubscribed_before_it_is_lent_is_lent_to_others(stack: Stack, pool_clock: PoolClock) -> None:
    """A subscriber that leaves a stream before it has borrowed asks for its payloads in messages no more."""
    with lending(stack, pool_clock) as (bus, worker, first):
        fickle = bus.subscriber(TOPIC)
        wait_wanted(worker.publisher, inline_topic("messages"))
        fickle.unsubscribe(TOPIC)
        wait_unwanted(worker.publisher, inline_topic("messages"))
        pool_clock.pass_grace()
        assert worker.publish(large(0))
        assert payloads_of([take(first)]) == large(0)


def test_batches_of_other_sites_keep_no_loan(stack: Stack, pool_clock: PoolClock) -> None:
    """The uplink lends nothing, though a worker has its number: that goes on lending to who reads both."""
    with lending(stack, pool_clock) as (bus, worker, first):
        uplink = bus.publisher("uplink.1")
        wait_wanted(uplink, TOPIC)
        uplink.publish(TOPIC, Datagrams("messages", 0), make_batch([]))
        take_mark(first)
        worker.turn()
        for number in range(8):
            assert worker.publish(large(number))
            assert payloads_of([take(first)]) == large(number)
            uplink.publish(TOPIC, Datagrams("messages", 0), make_batch([b"%d" % number]))
            assert payloads_of([take(first)]) == [b"%d" % number]
            worker.turn()


def test_loan_that_can_not_be_read_is_missed(stack: Stack, pool_clock: PoolClock) -> None:
    """A loan from before a subscriber borrowed is rejected as `not_borrowed`, shows as missed, and is the last one.

    Until it can borrow payloads come in messages, and then they are lent again.
    """
    with lending(stack, pool_clock) as (bus, worker, first):
        late, continuity = bus.subscriber("datagrams/"), Continuity()
        wait_until(lambda: "datagrams/" in worker.publisher.new_subscriptions(), "the late one is seen")
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
        worker.admit(leaving, staying)
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
                worker.admit(subscriber)
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
            worker.admit(prompt)
            for number in range(6):
                assert worker.publish(large(number))
                found.append(payloads_of([take(prompt)]))
            worker.publisher.close()
        with LendingWorker(bus, pool_clock) as worker:
            wait_wanted(worker.publisher, TOPIC)
            worker.admit(prompt, behind)  # to one that is behind comes the predecessor's mark
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
        worker.admit(subscriber)
        batch = make_batch([b"x"])
        for chunk in (0, 3, 1 << 62):
            vandal.publish(TOPIC, Datagrams("messages", 0, 1, chunk), batch)
        worker.publisher.publish(TOPIC, Datagrams("messages", 0, 1, 3), batch)
        wait_until(lambda: (subscriber.receive(), subscriber.rejected["not_borrowed"] == 4)[1], "all are rejected")
        wait_wanted(worker.publisher, inline_topic("messages"))
        worker.publish(large(0))
        assert payloads_of([take(subscriber)]) == large(0)
