import random
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import pairwise
from typing import Any, Self

import msgpack
import pytest

from services.broker.proxy import Proxy
from shared.bus.messages import (
    REGISTRY_TOPIC,
    VERSION,
    Datagrams,
    ServeReply,
    datagrams_topic,
)
from shared.datagrams.limits import MAX_ROWS
from shared.datagrams.routing import Router
from shared.ledger.accounts import Accounts
from shared.ledger.equations import discrepancies
from shared.net.sockets import enlarge_receive_buffer
from shared.process.lifecycle import CANT_CREATE
from tests.builders import (
    SOURCES,
    BusEnds,
    PlayedGateway,
    PlayedWorker,
    accounts_when,
    flow,
    freeze,
    kill_all,
    make_batch,
    make_client,
    take,
    wait_unwanted,
    wait_wanted,
)
from tests.stack import DRAIN_SECONDS, Stack, wait_until

TOPIC = datagrams_topic("messages")


class Collector:
    """A collector's socket, with room for everything."""

    def __init__(self, name: str, **fields: Any) -> None:
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        enlarge_receive_buffer(self.socket, 16 << 20)
        self.socket.bind(("127.0.0.1", 0))
        self.socket.settimeout(60)
        self.client = make_client(name, self.socket.getsockname()[1], **fields)

    def take(self, count: int) -> list[bytes]:
        """The next datagrams, waited for."""
        return [self.socket.recv(1 << 16) for _ in range(count)]

    def waiting(self) -> list[bytes]:
        """The datagrams that are there now."""
        found = []
        self.socket.setblocking(False)
        try:
            while True:
                found.append(self.socket.recv(1 << 16))
        except BlockingIOError:
            return found
        finally:
            self.socket.settimeout(60)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()


@pytest.fixture
def bus(stack: Stack) -> Iterator[BusEnds]:
    """A broker, in this process, a forwarder, and the test's own ends of their bus."""
    with Proxy(stack.bus, 256):
        stack.start("forwarder")
        with BusEnds(stack.bus) as ends:
            yield ends
        kill_all(stack)


@pytest.fixture
def gateway(bus: BusEnds) -> PlayedGateway:
    """A gateway on the bus."""
    return PlayedGateway(bus)


@pytest.fixture
def worker(bus: BusEnds) -> PlayedWorker:
    """An ingest worker on the bus."""
    return PlayedWorker(bus)


@pytest.fixture
def opened(lab: None) -> Iterator[ExitStack]:
    """Closes what a test enters into it."""
    with ExitStack() as everything:
        yield everything


def by_exporter(payloads: list[bytes]) -> dict[bytes, list[bytes]]:
    """Payloads that begin with their exporter's number and a dot, in the order they came, by exporter."""
    found: dict[bytes, list[bytes]] = {}
    for payload in payloads:
        found.setdefault(payload.partition(b".")[0], []).append(payload)
    return found


def test_collectors_get_what_routing_says(
    bus: BusEnds, gateway: PlayedGateway, worker: PlayedWorker, opened: ExitStack
) -> None:
    """Each collector gets exactly its rows, each exporter's in order: all, by prefix, by sampling, by group."""
    fields: dict[str, dict[str, Any]] = {
        "all": {},
        "stream": {"streams": ("messages",)},
        "v4": {"prefixes": ("192.0.2.0/24",)},
        "some": {"prefixes": ("2001:db8::/32", "192.0.2.1/32"), "sample": 3},
        "one": {"group": "g"},
        "two": {"group": "g", "prefixes": ("192.0.0.0/8",)},
        "other": {"streams": ("traps",)},
    }
    collectors = {name: opened.enter_context(Collector(name, **each)) for name, each in fields.items()}
    flow(gateway, worker, 1, *(collector.client for collector in collectors.values()))
    router, expected = Router(), {name: list[bytes]() for name in collectors}
    router.replace(collector.client for collector in collectors.values())
    for number in range(20):
        payloads = [b"%d.%d.%d." % (row % len(SOURCES), number, row) * (1 + row % 3) for row in range(number * 3)]
        worker.publish(payloads)
        for client, selection in router.route(make_batch(payloads, SOURCES)):
            rows = range(len(payloads)) if selection.indices is None else selection.indices.tolist()
            expected[client.name] += [payloads[row] for row in rows]
    got = {name: collector.take(len(expected[name])) for name, collector in collectors.items()}
    assert {name: by_exporter(each) for name, each in got.items()} == {
        name: by_exporter(each) for name, each in expected.items()
    }
    assert expected["one"]
    assert expected["two"]
    accounts = accounts_when(bus, "forwarder.1", lambda found: found["collector/all"]["sent"] == 570)
    assert {name: accounts[f"collector/{name}"].get("sent", 0) for name in collectors} == {
        name: len(payloads) for name, payloads in expected.items()
    }
    assert not any(collector.waiting() for collector in collectors.values())


def test_many_collectors_are_served_side_by_side(
    bus: BusEnds, gateway: PlayedGateway, worker: PlayedWorker, opened: ExitStack
) -> None:
    """Of large batches each of eight collectors gets all rows, each exporter's in order, whatever one of them does."""
    collectors = [opened.enter_context(Collector(f"c{number}")) for number in range(8)]
    gone = Collector("gone")
    gone.socket.close()
    half = opened.enter_context(Collector("half", sample=2))
    flow(gateway, worker, 1, *(collector.client for collector in (*collectors[:4], gone, half, *collectors[4:])))
    draw, sent = random.Random(1), list[bytes]()
    for _ in range(6):
        exporters = [draw.randrange(len(SOURCES)) for _ in range(MAX_ROWS)]
        payloads = [
            b"%d.%d" % (each, len(sent) + row) + b"." * draw.randrange(200) for row, each in enumerate(exporters)
        ]
        worker.publish(payloads, [SOURCES[each] for each in exporters])
        sent += payloads
        for collector in collectors:
            assert by_exporter(collector.take(MAX_ROWS)) == by_exporter(payloads)
    half_sent = by_exporter(half.take(len(sent) // 2))
    assert {
        name: [each for each in came if each in set(half_sent[name])] for name, came in by_exporter(sent).items()
    } == half_sent
    accounts = accounts_when(bus, "forwarder.1", lambda found: found["collector/c7"]["sent"] == len(sent))
    for number in range(8):
        account = accounts[f"collector/c{number}"]
        assert account["sent"] == account["offered"] == account["expected"] == len(sent)
        assert account["bytes"] == sum(map(len, sent))
    account = accounts["collector/gone"]
    assert account["offered"] == len(sent) == account["sent"] + account["dropped_refused"]
    assert account["dropped_refused"] > len(sent) // 2
    assert accounts["collector/half"]["sent"] == len(sent) // 2
    assert not any(collector.waiting() for collector in (*collectors, half))


def test_streams_that_take_turns_each_keep_their_order(stack: Stack, opened: ExitStack) -> None:
    """Datagrams of streams that take turns leave stream by stream, complete, each in its order."""
    streams = [f'[[stream]]\nname = "{name}"\nlisten = ["udp://127.0.0.1:6666"]\n' for name in ("messages", "traps")]
    stack.configure("".join(streams))
    opened.enter_context(Proxy(stack.bus, 256))
    forwarder = stack.start("forwarder")
    bus = opened.enter_context(BusEnds(stack.bus))
    opened.callback(kill_all, stack)
    gateway, worker = PlayedGateway(bus), PlayedWorker(bus)
    both = opened.enter_context(Collector("both"))
    traps = opened.enter_context(Collector("traps", streams=("traps",)))
    gateway.announce(1, both.client, traps.client)
    for name in ("messages", "traps"):
        wait_wanted(worker.publisher, datagrams_topic(name))
    freeze(forwarder)
    wanted: dict[bytes, list[bytes]] = {b"messages": [], b"traps": []}
    for number in range(100):
        for stream, payloads in wanted.items():
            payloads.append(b"%s.%d" % (stream, number))
        worker.publish(wanted[b"messages"][-1:])
        batch = make_batch(wanted[b"traps"][-1:], stream="traps")
        assert worker.publisher.publish(datagrams_topic("traps"), Datagrams("traps", 0), batch)
    forwarder.process.send_signal(signal.SIGCONT)
    arrived = both.take(200)
    assert by_exporter(arrived) == wanted
    turns = sum(one.partition(b".")[0] != other.partition(b".")[0] for one, other in pairwise(arrived))
    assert turns < 50, "each batch was sent by itself"
    assert traps.take(100) == wanted[b"traps"]


def test_only_relayed_collectors_are_served(gateway: PlayedGateway, worker: PlayedWorker, opened: ExitStack) -> None:
    """A name on the list, and a collector that wants the exporter's address, get nothing from the forwarder."""
    ours = opened.enter_context(Collector("ours"))
    others = [
        opened.enter_context(Collector("name", streams=())),
        opened.enter_context(Collector("o", source="original")),
    ]
    flow(gateway, worker, 1, ours.client, *(other.client for other in others))
    for payload in (b"x", b"y"):  # when the second has come, the first has gone to everybody
        worker.publish([payload])
        assert ours.take(1) == [payload]
    assert [other.waiting() for other in others] == [[], []]


def test_change_adds_and_removes(gateway: PlayedGateway, worker: PlayedWorker, opened: ExitStack) -> None:
    """From the revision that is said to be served on, who left gets nothing more and who joined gets everything."""
    leaves, stays, joins = (opened.enter_context(Collector(name)) for name in ("leaves", "stays", "joins"))
    flow(gateway, worker, 1, leaves.client, stays.client)
    worker.publish([b"one"])
    assert (leaves.take(1), stays.take(1)) == ([b"one"], [b"one"])
    gateway.change(2, [joins.client], ["leaves"])
    gateway.wait_served(2, worker.report)
    worker.publish([b"two"])
    assert (stays.take(1), joins.take(1)) == ([b"two"], [b"two"])
    assert leaves.waiting() == []


def test_stream_is_subscribed_to_while_somebody_wants_it(
    bus: BusEnds, gateway: PlayedGateway, worker: PlayedWorker, opened: ExitStack
) -> None:
    """With the last collector of a stream the subscription to it goes; what passes until the next is not missed."""
    collector = opened.enter_context(Collector("a"))
    flow(gateway, worker, 1, collector.client)
    gateway.change(2, left=["a"])
    wait_unwanted(worker.publisher, TOPIC)
    worker.lose(1000)
    gateway.change(3, [collector.client])
    wait_wanted(worker.publisher, TOPIC)
    worker.publish([])
    gateway.wait_served(3)
    worker.publish([b"x"])
    assert collector.take(1) == [b"x"]
    accounts = accounts_when(bus, "forwarder.1", lambda found: found["collector/a"]["sent"] == 1)
    assert accounts["collector/a"].get("missed", 0) == 0


def test_known_worker_is_waited_for(gateway: PlayedGateway, worker: PlayedWorker, opened: ExitStack) -> None:
    """Copies are said to flow only once every worker that reports has marked the stream."""
    worker.report()
    gateway.announce(1, opened.enter_context(Collector("a")).client)
    number = gateway.ask(1)
    wait_wanted(worker.publisher, TOPIC)
    time.sleep(0.5)
    assert gateway.replies.receive() is None
    worker.publish([])
    assert take(gateway.replies).body == ServeReply(number, 1)


def test_question_is_answered_once_and_only_when_served(
    gateway: PlayedGateway, worker: PlayedWorker, opened: ExitStack
) -> None:
    """A question about a revision that has not come waits for it, and each question is answered once."""
    clients = [opened.enter_context(Collector(name)).client for name in "ab"]
    flow(gateway, worker, 1, *clients[:1])
    ahead = gateway.ask(2)
    gateway.announce(1, *clients[:1])
    time.sleep(0.5)
    assert gateway.replies.receive() is None
    gateway.announce(2, *clients)
    assert take(gateway.replies).body == ServeReply(ahead, 2)
    gateway.wait_served(2, worker.report)
    assert gateway.replies.receive() is None


def test_gap_is_missed_by_each_collector(
    bus: BusEnds, gateway: PlayedGateway, worker: PlayedWorker, opened: ExitStack
) -> None:
    """Datagrams lost on the bus show on every collector of the stream, and all accounts add up."""
    first, other = opened.enter_context(Collector("a")), opened.enter_context(Collector("other", streams=("traps",)))
    flow(gateway, worker, 1, first.client, other.client)
    worker.publish([b"before"])
    worker.lose(30)
    worker.lose(12)
    worker.publish([b"after"])
    assert first.take(2) == [b"before", b"after"]
    accounts = accounts_when(bus, "forwarder.1", lambda found: found["collector/a"].get("missed") == 42)
    assert accounts["collector/a"]["expected"] == 44
    assert accounts["collector/other"]["expected"] == 0
    (origin,) = (account for name, account in accounts.items() if name.startswith("origin/"))
    assert origin == {"baseline": 0, "taken": 2, "missed": 42, "reached": 44}


def test_gap_at_the_end_is_found_by_the_workers_own_count(
    bus: BusEnds, gateway: PlayedGateway, worker: PlayedWorker, opened: ExitStack
) -> None:
    """A loss after the last batch that came is missed as soon as the worker reports, and is counted once."""
    collector = opened.enter_context(Collector("a"))
    flow(gateway, worker, 1, collector.client)
    worker.publish([b"last"])
    worker.lose(5)
    worker.report()
    accounts_when(bus, "forwarder.1", lambda found: found["collector/a"].get("missed") == 5)
    worker.report()
    worker.publish([b"next"])
    assert collector.take(2) == [b"last", b"next"]
    accounts = accounts_when(bus, "forwarder.1", lambda found: found["collector/a"]["offered"] == 2)
    assert accounts["collector/a"]["missed"] == 5


def test_repeated_batch_is_not_sent_again(
    bus: BusEnds, gateway: PlayedGateway, worker: PlayedWorker, opened: ExitStack
) -> None:
    """A batch that comes twice is copied once."""
    collector = opened.enter_context(Collector("a"))
    flow(gateway, worker, 1, collector.client)
    worker.publish([b"once"])
    worker.repeat([b"once"])
    worker.publish([b"next"])
    assert collector.take(2) == [b"once", b"next"]
    assert accounts_when(bus, "forwarder.1", lambda _: True)["collector/a"]["offered"] == 2


def test_restarted_worker_is_no_loss(
    bus: BusEnds, gateway: PlayedGateway, worker: PlayedWorker, opened: ExitStack
) -> None:
    """A worker that begins again is another origin, whose count from zero is missed by nobody."""
    collector = opened.enter_context(Collector("a"))
    flow(gateway, worker, 1, collector.client)
    worker.publish([b"x"] * 100)
    again = PlayedWorker(bus)
    wait_wanted(again.publisher, TOPIC)
    again.publish([b"y"])
    assert collector.take(101) == [b"x"] * 100 + [b"y"]
    accounts = accounts_when(bus, "forwarder.1", lambda found: found["collector/a"]["offered"] == 101)
    assert accounts["collector/a"].get("missed", 0) == 0
    assert len([name for name in accounts if name.startswith("origin/ingest.1/")]) == 2


def test_dead_collector_does_not_disturb_the_living(
    bus: BusEnds, gateway: PlayedGateway, worker: PlayedWorker, opened: ExitStack
) -> None:
    """With a closed port and an unreachable address beside it, a live collector gets every datagram."""
    live, dead = opened.enter_context(Collector("live")), opened.enter_context(Collector("dead"))
    dead.socket.close()
    lost = make_client("lost", address="192.0.2.1")
    flow(gateway, worker, 1, dead.client, lost, live.client)
    payloads = [[b"%d" % (number * row) for row in range(200)] for number in range(20)]
    for each in payloads:
        worker.publish(each)
    assert live.take(4000) == [payload for each in payloads for payload in each]
    accounts = accounts_when(bus, "forwarder.1", lambda found: found["collector/live"]["sent"] == 4000)
    assert accounts["collector/dead"]["refusals"] > 0
    assert accounts["collector/lost"]["dropped_not_connected"] == 4000


def test_lost_change_is_healed_by_the_whole_registry(
    gateway: PlayedGateway, worker: PlayedWorker, opened: ExitStack
) -> None:
    """After a hole in the changes the forwarder asks for the registry anew, and serves it; also if no other one comes.

    What is lost of that is asked for again.
    """
    first, second = opened.enter_context(Collector("a")), opened.enter_context(Collector("b"))
    flow(gateway, worker, 1, first.client)
    gateway.publisher.new_subscriptions()
    gateway.ask(3)
    for _ in range(2):
        wait_until(lambda: REGISTRY_TOPIC in gateway.publisher.new_subscriptions(), "the registry is asked for")
    gateway.announce(3, second.client)
    gateway.wait_served(3, worker.report)
    worker.publish([b"x"])
    assert second.take(1) == [b"x"]
    assert first.waiting() == []


def test_restarted_gateway_is_followed(
    bus: BusEnds, gateway: PlayedGateway, worker: PlayedWorker, opened: ExitStack
) -> None:
    """A gateway that counts revisions from the start again is taken at its word."""
    first, second = opened.enter_context(Collector("a")), opened.enter_context(Collector("b"))
    flow(gateway, worker, 50, first.client)
    flow(PlayedGateway(bus), worker, 1, second.client)
    worker.publish([b"x"])
    assert second.take(1) == [b"x"]
    assert first.waiting() == []


def test_registry_that_cannot_be_served_is_dropped(
    bus: BusEnds, gateway: PlayedGateway, worker: PlayedWorker, opened: ExitStack
) -> None:
    """A registry message with a client no copy can be sent to is counted and dropped, and the old one goes on."""
    collector = opened.enter_context(Collector("a"))
    flow(gateway, worker, 1, collector.client)
    bad = {"name": "bad", "generation": 1, "address": "127.0.0.1", "port": 9, "streams": ["*"]}
    for fields in ({"port": 70_000}, {"sample": 0}, {"from": ["::/0"]}, {"prefixes": ["all"]}, {"address": "host"}):
        envelope = msgpack.packb([VERSION, "registry.change", "gateway.1", gateway.publisher.boot, 9, 0])
        body = msgpack.packb([2, [bad | fields], []])
        gateway.publisher.socket.send_multipart([REGISTRY_TOPIC.encode(), envelope, body])
    accounts = accounts_when(bus, "forwarder.1", lambda found: found["forwarder"]["bus_rejected"] == 5)
    assert accounts["forwarder"]["revision"] == 1
    worker.publish([b"x"])
    assert collector.take(1) == [b"x"]


def test_killed_forwarder_serves_again_by_itself(
    stack: Stack, gateway: PlayedGateway, worker: PlayedWorker, opened: ExitStack
) -> None:
    """After SIGKILL and restart its subscription brings the registry, and copies flow again."""
    collector = opened.enter_context(Collector("a"))
    flow(gateway, worker, 1, collector.client)
    stack["forwarder"].stop(signal.SIGKILL)
    wait_unwanted(gateway.publisher, REGISTRY_TOPIC)
    wait_unwanted(worker.publisher, TOPIC)
    stack.start("forwarder")
    flow(gateway, worker, 1, collector.client)
    worker.publish([b"again"])
    assert collector.take(1) == [b"again"]


def test_forwarder_drains(stack: Stack, gateway: PlayedGateway, worker: PlayedWorker, opened: ExitStack) -> None:
    """After SIGTERM what is still published is delivered; exit 0, and the last accounts are in the log and add up."""
    collector = opened.enter_context(Collector("a"))
    flow(gateway, worker, 1, collector.client)
    worker.publish([b"before"])
    forwarder = stack["forwarder"]
    forwarder.process.send_signal(signal.SIGTERM)
    worker.lose(3)
    worker.publish([b"after"])
    assert collector.take(2) == [b"before", b"after"]
    assert forwarder.process.wait(DRAIN_SECONDS) == 0
    (drained,) = forwarder.events("drained")
    assert list(discrepancies(drained["accounts"])) == []
    account = drained["accounts"]["collector/a"]
    assert (account["sent"], account["missed"], account["expected"]) == (2, 3, 5)


def test_forwarder_ends_although_datagrams_keep_coming(
    stack: Stack, gateway: PlayedGateway, worker: PlayedWorker, opened: ExitStack
) -> None:
    """Under load that never falls silent SIGTERM still ends it with 0 in time, and its accounts add up."""
    collector = opened.enter_context(Collector("a"))
    flow(gateway, worker, 1, collector.client)
    forwarder = stack["forwarder"]
    forwarder.process.send_signal(signal.SIGTERM)
    received = 0

    def ended() -> bool:
        nonlocal received
        worker.publish([b"x"] * 10)
        received += len(collector.waiting())
        return forwarder.process.poll() is not None

    wait_until(ended, "the forwarder ends", DRAIN_SECONDS)
    assert forwarder.process.returncode == 0
    account = forwarder.events("drained")[0]["accounts"]["collector/a"]
    assert list(discrepancies({"collector/a": account})) == []
    assert account["sent"] == received + len(collector.waiting()) > 0


def test_many_entries_of_one_address_cost_another_nothing(
    stack: Stack, bus: BusEnds, gateway: PlayedGateway, worker: PlayedWorker, opened: ExitStack
) -> None:
    """After a loss an address with many entries loses copies while there is no time for all, and another none."""
    crowd = [make_client(f"crowd{port}", port, address="127.0.0.2") for port in range(20_000, 20_150)]
    fine = opened.enter_context(Collector("fine"))
    for client in crowd:  # which never reads: what it has no room for is lost at its host
        sock = opened.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        sock.bind((client.address, client.port))
    flow(gateway, worker, 1, fine.client, *crowd)
    freeze(stack["forwarder"])
    for _ in range(3000):  # more than all queues hold
        worker.publish([b"lost, perhaps"])
    stack["forwarder"].process.send_signal(signal.SIGCONT)
    accounts_when(bus, "forwarder.1", lambda found: found["collector/fine"].get("sent"))  # now there is room again
    missed = settled(bus, worker)["collector/fine"]["missed"]
    fine.take(worker.published - missed)
    payloads = [b"%d." % row + bytes(7 * row) for row in range(100)]  # of sizes that do not leave together
    for _ in range(8):  # one is enough, unless the forwarder had to wait in the middle of it
        freeze(stack["forwarder"])
        for _ in range(80):
            worker.publish(payloads)
        stack["forwarder"].process.send_signal(signal.SIGCONT)
        assert sorted(fine.take(8000)) == sorted(payloads * 80)
        accounts = settled(bus, worker)
        assert accounts["collector/fine"]["missed"] == missed
        assert "dropped_over_share" not in accounts["collector/fine"]
        if over_share := sum(accounts[f"collector/{client.name}"].get("dropped_over_share", 0) for client in crowd):
            break
    assert over_share


def settled(bus: BusEnds, worker: PlayedWorker) -> Accounts:
    """Return the forwarder's accounts when it has learnt of all that was published; the worker reports until then."""

    def is_settled(accounts: Accounts) -> bool:
        worker.report()  # again and again, as workers do: one report may find the queue full
        fine = accounts["collector/fine"]
        return fine.get("missed", 0) > 0 and fine["expected"] == fine["missed"] + fine["sent"] == worker.published

    return accounts_when(bus, "forwarder.1", is_settled)


def test_a_second_forwarder_of_a_bus_is_refused(stack: Stack) -> None:
    """Each copy would leave twice: the second one ends and says so, also after others have removed the first's file."""
    stack.start("broker")
    forwarder = stack.start("forwarder")
    accounts = stack.bus / "accounts.forwarder"
    second = stack.start("forwarder.2", ready=False)
    assert second.process.wait(60) == CANT_CREATE
    assert f"another forwarder runs on {stack.bus}: collectors would get each copy twice" in second.text
    accounts.unlink()
    wait_until(accounts.exists, "the accounts are made anew")
    forwarder.wait_for("another program has removed the file of accounts")
    assert stack.start("forwarder", ready=False).process.wait(60) == CANT_CREATE
