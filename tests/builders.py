"""Builds what several tests need: batches, envelopes, clients, and the test's own ends of the bus."""

import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import msgpack
import numpy as np

from shared.bus.bodies.offload_messages import KernelCopies, KernelServed, OffloadReply
from shared.bus.bodies.packing import MAX_ITEMS
from shared.bus.endpoint import DIRECT, BusLink
from shared.bus.loans.borrower import Borrower
from shared.bus.messages import (
    REGISTRY_TOPIC,
    VERSION,
    Datagrams,
    Envelope,
    Message,
    RegistryChange,
    RegistrySnapshot,
    ServeReply,
    ServeRequest,
    Status,
    datagrams_topic,
    encode,
    offload_topic,
    serve_topic,
    status_topic,
)
from shared.bus.status import Reports
from shared.bus.zmq_sockets import Publisher, Requests, Subscriber, new_context
from shared.client import ALL_STREAMS, Client, Source
from shared.datagrams.batch import ROW, DatagramBatch, make_rows
from shared.ledger.accounts import Accounts
from shared.ledger.equations import discrepancies
from shared.net.addresses import pack_address
from tests.stack import Running, Stack, wait_until
from tests.warm_start import Process

Datagram = tuple[str, int, bytes]
SOURCES = [f"192.0.2.{number}" for number in range(6)] + [f"2001:db8::{number}" for number in range(6)]


def make_batch(
    payloads: Sequence[bytes], sources: Sequence[str] = ("192.0.2.1",), stream: str = "messages", port: int = 514
) -> DatagramBatch:
    """A batch of these payloads, the sources taken in turn."""
    addresses = [pack_address(sources[number % len(sources)]) for number in range(len(payloads))]
    rows = make_rows([len(payload) for payload in payloads], addresses, port) if payloads else np.empty(0, ROW)
    return DatagramBatch(stream, 1_700_000_000_000_000_000, rows, b"".join(payloads))


def make_envelope(
    sequence: int = 0, total: int = 0, *, boot: int = 1, sender: str = "ingest.1", kind: str = "datagrams"
) -> Envelope:
    """An envelope of this version."""
    return Envelope(VERSION, kind, sender, boot, sequence, total)


def make_client(name: str, port: int = 9, **fields: Any) -> Client:
    """A collector of every stream on loopback, unless `fields` say otherwise."""
    defaults: dict[str, Any] = {"generation": 1, "address": "127.0.0.1", "streams": ("*",)}
    return Client(name=name, port=port, **(defaults | fields))


def heavy_bodies() -> list[tuple[str, bytes]]:
    """Kinds and bodies of under 1 MiB that take as much memory as any when decoded.

    The first are sound and as long as the limits allow; then come trees of containers, each within the limits; the last
    have more items than the limits allow.
    """
    accounts = {f"{number:024x}": {"": 1} for number in range(MAX_ITEMS - 1)}
    many = {f"{number:05x}": {"": 1} for number in range(115_000)}
    client = {"name": "", "generation": 1, "address": "::", "port": 1}
    tree_of_maps = b"\xdc\x03\xf0" + (b"\x81\xa0" * 500 + b"\x80") * 1008
    tree_of_arrays = b"\xdc\x03\xf0" + (b"\x91" * 1000 + b"\x90") * 1008
    empty_maps = b"\xdc\x00\x1f" + (b"\xdc\x7f\xff" + b"\x80" * 0x7FFF) * 0x1F
    return [
        ("status", msgpack.packb(["ingest.9", 1, 0, 1, 0, 1, accounts])),
        ("registry.change", msgpack.packb([1, 2, [], ["n" * 28] * MAX_ITEMS])),
        ("registry.snapshot", msgpack.packb([1, 0, 1, [client | {"prefixes": ["::/0"] * 256}] * 700])),
        ("registry.snapshot", msgpack.packb([1, 0, 1, [client] * 25_000])),
        ("health", msgpack.packb(["relay", 1, 0, 1, [["n" * 20, 1, "slow", 0, 0]] * MAX_ITEMS])),
        *(("serve.reply", b"\x93\x01\x01" + tree) for tree in (tree_of_maps, tree_of_arrays, empty_maps)),
        ("status", msgpack.packb(["ingest.9", 1, 0, 1, 0, 1, many])),
        ("status", msgpack.packb(["ingest.9", 1, 0, 1, 0, 1, {"a": dict.fromkeys(many, 1)}])),
        ("registry.change", msgpack.packb([1, 2, [], ["ab"] * 340_000])),
        ("registry.snapshot", msgpack.packb([1, 0, 1, [client | {"prefixes": ["::/0"] * 190_000}]])),
        ("registry.snapshot", msgpack.packb([1, 0, 1, [{}] * 1_000_000])),
        ("health", msgpack.packb(["relay", 1, 0, 1, [["a", 1, "slow", 0, 0]] * 90_000])),
    ]


class BusEnds:
    """Publishers and subscribers of the test itself, closed with it; what they have not sent by then is let go."""

    def __init__(self, directory: Path, link: BusLink = DIRECT) -> None:
        self.directory = directory
        self._link = link
        self.context = new_context()
        self._publishers: list[Publisher] = []
        self._subscribers: list[Subscriber] = []

    def publisher(self, sender: str = "ingest.1", high_water_mark: int = 256) -> Publisher:
        """A publisher connected to the broker's side for publishers."""
        publisher = Publisher(self.context, self.directory, sender, high_water_mark, self._link)
        self._publishers.append(publisher)
        return publisher

    def subscriber(self, *prefixes: str, high_water_mark: int = 4096) -> Subscriber:
        """A subscriber to these prefixes."""
        subscriber = Subscriber(self.context, self.directory, high_water_mark, self._link, Borrower)
        self._subscribers.append(subscriber)
        for prefix in prefixes:
            subscriber.subscribe(prefix)
        return subscriber

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for subscriber in self._subscribers:
            subscriber.close()
        for publisher in self._publishers:
            publisher.close(linger_ms=0)
        self.context.term()


def wait_wanted(publisher: Publisher, topic: str) -> None:
    """Wait until the publisher has seen a subscription that takes `topic`."""
    wait_until(lambda: (publisher.new_subscriptions(), publisher.wanted(topic))[1], f"somebody wants {topic}")


def wait_unwanted(publisher: Publisher, topic: str) -> None:
    """Wait until the publisher has seen the last subscription to `topic` go."""
    wait_until(lambda: (publisher.new_subscriptions(), not publisher.wanted(topic))[1], f"nobody wants {topic}")


def take(subscriber: Subscriber) -> Message:
    """The next message, waited for."""
    found: list[Message] = []

    def receive() -> bool:
        message = subscriber.receive()
        found.extend([message] if message else [])
        return bool(found)

    wait_until(receive, "a message comes")
    return found[0]


def take_datagrams(subscriber: Subscriber, count: int) -> list[Datagram]:
    """The next `count` datagrams, waited for; marks are passed over."""
    found: list[Datagram] = []
    while len(found) < count:
        batch = take(subscriber).batch
        if batch is not None:
            found += batch.datagrams()
    return found


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


def take_mark(subscriber: Subscriber, stream: str = "messages") -> None:
    """Wait for the mark that says that the stream flows to this subscriber."""
    message = take(subscriber)
    assert isinstance(message.body, Datagrams)
    assert message.body.stream == stream
    assert message.batch is not None
    assert not len(message.batch)


def take_last_report(subscriber: Subscriber) -> None:
    """Take the reports of a service until one says that it is the last."""
    ended = False
    while not ended:
        body = take(subscriber).body
        assert isinstance(body, Status)
        ended = body.ended


ASK_SECONDS: Final = 0.1


def accounts_when(bus: BusEnds, service: str, condition: Callable[[Accounts], object]) -> Accounts:
    """A service's accounts, which must add up, as soon as they meet a condition; one not there yet meets none.

    A service reports each second, and to each new subscriber: to ask it more often, this subscribes again and again.
    """
    subscriber, reports, last, topic = bus.subscriber("status/"), Reports(), Accounts(), status_topic(service)
    asked_at = 0.0

    def met() -> bool:
        nonlocal asked_at
        if time.monotonic() >= asked_at + ASK_SECONDS:
            asked_at = time.monotonic()
            subscriber.subscribe(topic)
            subscriber.unsubscribe(topic)
        while message := subscriber.receive():
            assert isinstance(message.body, Status)
            report = reports.add(message.envelope, message.body)
            if report and report.service == service:
                assert list(discrepancies(report.accounts)) == []
                last.update(report.accounts)
                with suppress(KeyError):
                    if condition(report.accounts):
                        return True
        return False

    try:
        wait_until(met, "the accounts are as they should be")
    except AssertionError as error:
        error.add_note("\n".join(f"{each.service}: {each.accounts}" for each in reports.latest.values()))
        raise
    subscriber.close()
    return last


class PlayedWorker:
    """An ingest worker played by the test, whose batches can be lost."""

    def __init__(self, bus: BusEnds) -> None:
        self.publisher = bus.publisher("ingest.1")
        self.published = self._sequence = 0

    def publish(self, payloads: Sequence[bytes], sources: Sequence[str] = SOURCES, generation: int = 0) -> None:
        """Publish a batch, which the kernel has copied for those that this generation serves."""
        self._send(payloads, sources, self._sequence, self.published, generation)
        self.lose(len(payloads))

    def repeat(self, payloads: Sequence[bytes]) -> None:
        """Publish a batch under the numbers of the last one."""
        self._send(payloads, SOURCES, self._sequence - 1, self.published - len(payloads))

    def lose(self, count: int) -> None:
        """Publish a batch of so many datagrams that the bus loses."""
        self._sequence += 1
        self.published += count

    def _send(
        self, payloads: Sequence[bytes], sources: Sequence[str], sequence: int, total: int, generation: int = 0
    ) -> None:
        parts = encode(
            datagrams_topic("messages"),
            Datagrams("messages", 0, generation=generation),
            sender=self.publisher.sender,
            boot=self.publisher.boot,
            sequence=sequence,
            total=total,
            batch=make_batch(payloads, sources),
        )
        self.publisher.socket.send_multipart(parts)

    def report(self) -> None:
        """Publish the worker's own count."""
        name = self.publisher.sender
        wait_wanted(self.publisher, status_topic(name))
        accounts = {"stream/messages": {"published": self.published}}
        self.publisher.publish(status_topic(name), Status(name, 1, 0, 1, 0, 1, accounts))


class PlayedGateway:
    """A gateway played by the test: a registry, and the question whether those of one `source` are served."""

    def __init__(self, bus: BusEnds, source: Source = "relay") -> None:
        self._serve = serve_topic(source)
        self.publisher = bus.publisher("gateway.1")
        self._requests = Requests("gateway.1", self.publisher.boot)
        self.replies = bus.subscriber(self._requests.topic)
        wait_wanted(self.publisher, self._requests.topic)  # here, and so on its way to those that answer

    def announce(self, revision: int, *clients: Client) -> None:
        """Publish the whole registry, to somebody who has subscribed to it."""
        wait_wanted(self.publisher, REGISTRY_TOPIC)
        self.publisher.publish(REGISTRY_TOPIC, RegistrySnapshot(revision, 0, 1, list(clients)))

    def change(self, revision: int, joined: Sequence[Client] = (), left: Sequence[str] = ()) -> None:
        """Publish a change."""
        self.publisher.publish(REGISTRY_TOPIC, RegistryChange(revision - 1, revision, list(joined), list(left)))

    def report(self, revision: int) -> None:
        """Tell the revision of the registry in the gateway's own status."""
        name = self.publisher.sender
        wait_wanted(self.publisher, status_topic(name))
        self.publisher.publish(status_topic(name), Status(name, 1, 0, 1, 0, 1, {"gateway": {"revision": revision}}))

    def ask(self, revision: int) -> int:
        """Ask whether a revision is served; return the id under which the answer comes."""
        wait_wanted(self.publisher, self._serve)
        number = self._requests.open(60, lambda _: None)
        self.publisher.publish(self._serve, ServeRequest(number, self._requests.topic, revision))
        return number

    def wait_served(self, revision: int, meanwhile: Callable[[], object] = lambda: None) -> None:
        """Wait until it is said that a revision is served; call `meanwhile` again and again until then."""
        number = self.ask(revision)

        def answered() -> bool:
            meanwhile()
            reply = self.replies.receive()
            return reply is not None and reply.body == ServeReply(number, revision)

        wait_until(answered, f"revision {revision} is served")


class PlayedOffload:
    """An offload service played by the test: it tells the forwarder what the kernel copies."""

    def __init__(self, bus: BusEnds) -> None:
        self.publisher = bus.publisher("offload.1")
        self._topic = offload_topic("relay")
        self._reply = f"reply/offload.1.{self.publisher.boot:x}/"
        self.replies = bus.subscriber(self._reply)
        wait_wanted(self.publisher, self._reply)
        self._serial = 0

    def tell(self, generation: int, *clients: Client, registry: int = 0, revision: int = 0) -> int:
        """Tell it of a generation that serves these; return the serial that it answers with.

        Of collectors of all streams it serves the copies of `messages`.
        """
        wait_wanted(self.publisher, self._topic)
        self._serial += 1
        served = [
            KernelServed(client, ("messages",) if ALL_STREAMS in client.streams else client.streams)
            for client in clients
        ]
        body = KernelCopies(generation, self._serial, self._reply, 0, 1, served, registry, revision)
        self.publisher.publish(self._topic, body)
        return self._serial

    def wait_known(self, serial: int) -> None:
        """Wait until the sender has said that it knows what it was told under this serial."""
        assert take(self.replies).body == OffloadReply(serial)


def flow(gateway: PlayedGateway, worker: PlayedWorker, revision: int, *clients: Client) -> None:
    """Announce a registry, and wait until copies flow to it; a worker that reports no more would not count as one."""
    gateway.announce(revision, *clients)
    wait_wanted(worker.publisher, datagrams_topic("messages"))
    worker.report()
    worker.publish([])
    gateway.wait_served(revision, worker.report)


def freeze(running: Running) -> None:
    """Stop a service, and wait until none of its threads runs any more; SIGCONT lets it go on."""
    freeze_process(running.process, running.name)


def freeze_process(process: Process, name: str) -> None:
    """Stop any process so."""
    process.send_signal(signal.SIGSTOP)
    tasks = Path(f"/proc/{process.pid}/task")
    wait_until(
        lambda: all(stat.read_text().rpartition(")")[2].split()[0] == "T" for stat in tasks.glob("*/stat")),
        f"{name} stands still",
    )


def kill_all(stack: Stack) -> None:
    """End every process at once: how one ends is tested where that is the point, and takes its time."""
    for running in stack.running:
        running.process.kill()
    for running in stack.running:
        running.process.wait()
