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
from shared.datagrams.limits import MAX_DATAGRAM, MAX_ROWS
from shared.process.lifecycle import OperatorError
from tests.builders import (
    BusEnds,
    drain,
    freeze,
    kill_all,
    make_batch,
    make_envelope,
    payloads_of,
    take,
    take_datagrams,
    wait_unwanted,
    wait_wanted,
)
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


@pytest.mark.parametrize(("size", "count", "places"), [(MAX_DATAGRAM, 8, 8), (60, MAX_ROWS, 2)])
def test_large_messages_take_more_places(stack: Stack, size: int, count: int, places: int) -> None:
    """Rows and payloads of 512 KiB take eight places of a queue, so that fewer fit; all that were taken arrive."""
    broker = stack.start("broker")
    with BusEnds(stack.bus) as bus:
        publisher, subscriber = bus.publisher(high_water_mark=40), bus.subscriber(TOPIC)
        wait_wanted(publisher, TOPIC)
        freeze(broker)
        took = [number for number in range(40) if publish(publisher, *[(b"%d" % number).ljust(size, b"\0")] * count)]
        assert took == list(range(len(took)))
        assert 40 // places <= len(took) < 2 * 40 // places
        broker.process.send_signal(signal.SIGCONT)
        arrived = take_datagrams(subscriber, count * len(took))
        assert [int(payload.rstrip(b"\0")) for _, _, payload in arrived[::count]] == took
        assert publish(publisher, b"small")
        assert payloads_of([take(subscriber)]) == [b"small"]
        assert subscriber.rejected == {}


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
