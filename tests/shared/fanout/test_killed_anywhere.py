"""A SIGKILL at any moment: after each line of a sender's code, its successor finds accounts that add up."""

import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any, NamedTuple, cast

import pytest

from services.forwarder.service import ForwarderService
from shared.bus import kept_counts
from shared.bus.kept_counts import KeptFile
from shared.bus.messages import Body, Datagrams, Message, RegistrySnapshot, Status, datagrams_topic
from shared.bus.zmq_sockets import Subscriber
from shared.client import Client
from shared.datagrams.gathered import Gathered
from shared.fanout import collectors, service, streams
from shared.fanout.collectors import Collectors
from shared.fanout.kernel_copies import KernelRules
from shared.fanout.streams import FollowedStreams
from shared.ledger.accounts import Accounts
from shared.ledger.counters import FILTERED, WITHHELD
from shared.ledger.equations import discrepancies
from shared.settings.model import Settings
from shared.settings.tables import Bus
from tests.builders import make_batch, make_client, make_envelope
from tests.traffic import open_receiver

TOPIC = datagrams_topic("messages")
OURS, THEIRS = "192.0.2.1", "198.51.100.1"
STEADY = ("all", "ours", "third", "one", "other")
"""Collectors of all, of one exporter, of every third datagram, and two of a group."""
TRACED = tuple(each.__file__ for each in (collectors, kept_counts, service, streams))


class Worker(NamedTuple):
    """A worker as its reports tell of it: what it has published, and dropped since nobody subscribed."""

    name: str
    boot: int
    started_ns: int = 0
    published: int = 0
    dropped: int = 0


class Moment(NamedTuple):
    """The state of the world between two lines: the file, the registry, the workers, and what has come and arrived."""

    content: bytes
    clients: tuple[Client, ...]
    workers: tuple[Worker, ...]
    published: int
    theirs: int
    arrived: tuple[int, ...]


class Sender:
    """A forwarder whose bus is played by the test, with real sockets to its collectors."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.path = directory / "accounts.forwarder"
        self.sockets = {name: open_receiver("127.0.0.1", 0)[0] for name in (*STEADY, "guest")}
        for sock in self.sockets.values():
            sock.setblocking(False)
        self.ports = {name: sock.getsockname()[1] for name, sock in self.sockets.items()}
        self.clients = self.steady()
        self.arrived: Counter[str] = Counter()
        self.workers = [Worker("ingest.1", 1), Worker("ingest.2", 2)]
        self.published = self.theirs = 0
        """The datagrams that workers have had; those of them that have come, and are not from our exporter."""
        self.moments: dict[Moment, None] = {}
        self.revision = 0

    def steady(self, **of_all: Any) -> tuple[Client, ...]:
        """The collectors; `of_all` are fields of the first."""
        own: dict[str, dict[str, Any]] = {
            "all": of_all,
            "ours": {"prefixes": (f"{OURS}/32",)},
            "third": {"sample": 3},
            "one": {"group": "g"},
            "other": {"group": "g"},
        }
        return tuple(make_client(name, self.ports[name], **own[name]) for name in STEADY)

    @contextmanager
    def serving(self) -> Iterator[None]:
        """A start of it; at the end it is killed: nothing is written any more."""
        settings = Settings(bus=Bus(directory=str(self.directory)))
        with ForwarderService("forwarder.1", settings) as self.service:
            yield
            self.service._kept.close()

    def take(self, body: Body, sender: str, boot: int, total: int = 0, batch: Any = None) -> None:
        """Let a message come."""
        topic = TOPIC if batch is not None else "else/"
        self.service._take(Message(topic, make_envelope(total, total, boot=boot, sender=sender), body, batch))

    def register(self, *clients: Client) -> None:
        """Let a registry come, and be served."""
        self.revision += 1
        self.clients = clients
        self.take(RegistrySnapshot(self.revision, 0, 1, list(clients)), "gateway.1", 1)
        while self.service._serving != self.service._replica.version:
            self.turn()

    def turn(self) -> None:
        """Let it do what is due."""
        self.service._turn()
        self.service._keep_up()

    def publish(self, number: int, count: int, *, lost: int = 0) -> None:
        """Let a worker publish, before that some datagrams that the bus loses."""
        worker = self._have(number, published=lost)
        batch = make_batch([b"x" * 20] * count, (OURS, THEIRS))
        self._have(number, published=count)
        self.theirs += count // 2
        self.take(Datagrams("messages", 0), worker.name, worker.boot, worker.published, batch)

    def report(self, number: int, *, lost: int = 0, dropped: int = 0) -> None:
        """Let a worker report; before that the bus loses some, and some are dropped for lack of subscribers."""
        worker = self._have(number, published=lost, dropped=dropped)
        self.take(status_of(worker), worker.name, worker.boot)

    def _have(self, number: int, **more: int) -> Worker:
        worker = self.workers[number - 1]
        counts = {name: getattr(worker, name) + count for name, count in more.items()}
        self.workers[number - 1] = worker = worker._replace(**counts)
        self.published += sum(more.values())
        return worker

    def note(self) -> None:
        """Note how things are now."""
        for name, sock in self.sockets.items():
            with suppress(BlockingIOError):
                while True:
                    sock.recv(100)
                    self.arrived[name] += 1
        arrived = tuple(self.arrived[name] for name in STEADY)
        content = self.path.read_bytes() if self.path.exists() else b""
        moment = Moment(content, self.clients, tuple(self.workers), self.published, self.theirs, arrived)
        self.moments[moment] = None

    def trace(self, frame: FrameType, event: str, _: object) -> Any:
        """Note how things are before each line of the traced modules."""
        if frame.f_code.co_filename not in TRACED:
            return None
        if event == "line":
            self.note()
        return self.trace

    def close(self) -> None:
        """Close the collectors' sockets."""
        for sock in self.sockets.values():
            sock.close()


def live(sender: Sender) -> None:
    """Go through gaps, ends, restarts, filters that change, and collectors that come and go."""
    steady = sender.steady()
    with sender.serving():
        sender.register(*steady)
        sender.publish(1, 0)
        sender.publish(2, 0)
        sender.report(1)
        sender.report(2)
        sender.turn()  # only now they are told to be served
        sender.publish(1, 7)
        sender.turn()
        sender.publish(2, 5, lost=2)
        sender.turn()
        sender.report(2, lost=3)
        sender.turn()
    sender._have(1, published=6)  # nobody serves
    with sender.serving():
        sender.register(*steady, make_client("guest", sender.ports["guest"], generation=3))
        sender.publish(1, 4)
        sender.publish(2, 3)
        sender.report(1, dropped=4)
        sender.turn()
        sender.register(*sender.steady(sample=2))
        sender.publish(1, 6)
        sender.turn()
        sender.register(*steady)
        sender.publish(1, 6)
        sender.turn()
        sender.workers[1] = Worker("ingest.2", 3, time.time_ns())
        sender.publish(2, 0)
        sender.publish(2, 5)
        sender.report(2)
        sender.publish(2, 5)
        sender.turn()


def status_of(worker: Worker) -> Status:
    """A worker's report."""
    account = {"published": worker.published, "dropped_no_subscriber": worker.dropped}
    return Status(worker.name, 1, worker.started_ns, 1, 0, 1, {"stream/messages": account})


def succeed(moment: Moment, path: Path) -> Accounts:
    """The accounts of a successor that gets a batch of three of each worker, behind five that nobody served.

    What it sends itself is `withheld`.
    """
    path.write_bytes(moment.content)
    kept = KeptFile(path)
    sheet = kept.open()
    subscriber = cast(Subscriber, SimpleNamespace(subscribe=lambda _: None, unsubscribe=lambda _: None))
    followed = FollowedStreams(subscriber, path.parent, kept)

    def reach(client: Client, account: Counter[str]) -> Any:
        return SimpleNamespace(
            client=client, account=account, held=SimpleNamespace(paused=False, count_templates=lambda: None)
        )

    served = Collectors[Any](["messages"], followed.published, reach, KernelRules("relay"), kept.new_counts)
    try:
        followed.restore(sheet.tables)
        served.restore(sheet)
        served.replace(moment.clients)
        followed.subscribe_to(served.streams_wanted())
        for worker in moment.workers:
            envelope = make_envelope(99, worker.published + 5, boot=worker.boot, sender=worker.name)
            followed.note_batch(TOPIC, envelope, 3)
            for destination, selection in served.route(Gathered([make_batch([b""] * 3, (THEIRS,))])):
                destination.account[WITHHELD] += 3 if selection.indices is None else len(selection.indices)
            followed.reconcile(envelope, status_of(worker._replace(published=worker.published + 8)))
        for unserved in followed.pop_unserved():
            served.count_unserved(unserved)
        return {**served.accounts(), **followed.accounts()}
    finally:
        followed.close()
        kept.close()


def check(moment: Moment, path: Path) -> None:
    """Compare a successor's accounts with what the test has counted."""
    found = succeed(moment, path)
    assert list(discrepancies(found)) == []
    for name, arrived in zip(STEADY, moment.arrived, strict=True) if moment.published else ():
        account = Counter(found[f"collector/{name}"])
        assert account["expected"] == moment.published + 16, name
        assert 0 <= arrived - account["sent"] <= account["dropped_unsure"], name
        assert account[FILTERED] <= moment.theirs + 6, name
        assert account[FILTERED] == 0 or name == "ours", name
        assert min(account.values()) >= 0, name


@pytest.mark.timeout(120)
def test_accounts_add_up_wherever_a_sender_is_killed(tmp_path: Path) -> None:
    """Between any two lines, what was published is what has arrived, or has a cause; nothing is counted twice."""
    sender = Sender(tmp_path)
    sys.settrace(sender.trace)
    try:
        live(sender)
    finally:
        sys.settrace(None)
        sender.close()
    wrong = []
    for moment in sender.moments:
        try:
            check(moment, tmp_path / "accounts.next")
        except AssertionError as error:
            wrong.append((moment[2:], str(error)[:300]))
    print(f"{len(sender.moments)} moments, {len(wrong)} wrong")
    assert len(sender.moments) > 300
    assert not wrong[:5]
