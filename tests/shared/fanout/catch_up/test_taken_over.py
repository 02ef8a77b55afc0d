"""A forwarder of a node of two, played to: what collectors are owed when they come back to it from the other node."""

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from services.forwarder.service import ForwarderService
from shared.bus import zmq_sockets
from shared.bus.bodies.nodes_message import NODES_TOPIC, Node, Nodes, NodeState
from shared.bus.messages import Body, Datagrams, Message, RegistrySnapshot, Status, datagrams_topic, status_topic
from shared.client import Client, Place
from shared.datagrams.batch import DatagramBatch
from shared.ledger.accounts import ENDED
from shared.ledger.counters import NOT_JOURNALED, PERHAPS_TWICE
from shared.serving_nodes import owner_of
from shared.settings.entries import Stream
from shared.settings.model import Settings
from shared.settings.tables import Bus
from shared.settings.uplink import Uplink
from tests.builders import make_batch, make_client, make_envelope
from tests.stack import wait_until
from tests.traffic import open_receiver

STREAM, INGEST = "flows", "ingest.1"
UPLINK = Uplink(servers=("nats://127.0.0.1:4222",), site="a", nodes=("a", "b"), minority="hold")
NAME = next(name for name in map(str, range(100)) if owner_of(name, UPLINK.nodes) == "a")


class Played:
    """The forwarder of the node `a`, the other services of its host, and the uplink that tells of `b`."""

    def __init__(self, service: ForwarderService, client: Client, other: NodeState) -> None:
        self.service = service
        self._take("registry/", RegistrySnapshot(1, 0, 1, [client]), "gateway.1")
        self.tell("joining", other=other)
        self.pass_time()

    def _take(self, topic: str, body: Body, sender: str, boot: int = 1, batch: DatagramBatch | None = None) -> None:
        sequence, total = self._at if batch is not None else (0, 0)
        self.service._take(Message(topic, make_envelope(sequence, total, sender=sender, boot=boot), body, batch))

    def publish(self, boot: int, total: int, count: int, worker: str = INGEST) -> None:
        """Let a batch of a start of a worker come, behind `total` datagrams; 0: a mark."""
        self._at = total + (count > 0), total
        payloads = [b"%d/%d" % (boot, total + number) for number in range(count)]
        batch = replace(make_batch(payloads, stream=STREAM), received_ns=time.time_ns())
        self._take(datagrams_topic(STREAM), Datagrams(STREAM, batch.received_ns), worker, boot, batch)

    def report(self, boot: int, published: int, **ended: int) -> None:
        """Let a start of ingest report, also with how many datagrams earlier ones have ended."""
        accounts = {f"{ENDED}{name[1:]}/{STREAM}": {"published": count} for name, count in ended.items()}
        accounts[f"stream/{STREAM}"] = {"published": published}
        status = Status("ingest", 1, time.time_ns(), 1, 0, 1, accounts)
        self._take(status_topic(INGEST), status, INGEST, boot)

    def tell(self, state: NodeState, *places: Place, other: NodeState = "live", majority: bool = True) -> None:
        """Let the uplink tell how this node is, and the other one, and how far that one's forwarder is."""
        serving = ("b",) if state == "joining" else ("a", "b")
        nodes = [Node("a", state), Node("b", other, 0, 0, 1, {"relay": list(places)}, serving=serving)]
        live = Nodes(True, nodes).live if majority else ()
        self._take(NODES_TOPIC, Nodes(majority, nodes, live), "uplink.1")

    def pass_time(self) -> None:
        """Let it do what is due."""
        self.service._catch_up.due_at = 0.0
        self.service._turn()
        self.service._upkeep_at = 0.0
        self.service._keep_up()

    def is_level(self) -> bool:
        """Let it do what is due; return whether its collector gets live copies."""
        self.pass_time()
        return NAME in self.service._collectors and not self.service._catch_up._pursued


@pytest.fixture(autouse=True)
def no_linger(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no broker to wait for."""
    monkeypatch.setattr(zmq_sockets, "LINGER_MS", 0)


@contextmanager
def forwarder(directory: Path, port: int, other: NodeState = "live") -> Iterator[Played]:
    """One start of the forwarder, while the other node is in a state."""
    settings = Settings(
        bus=Bus(directory=str(directory)), streams=(Stream(name=STREAM, listen=("udp://[::1]:9",)),), uplink=UPLINK
    )
    with ForwarderService("forwarder.1", settings) as service:
        played = Played(service, make_client(NAME, port, streams=(STREAM,)), other)
        yield played
    del service, played.service  # and what it has open of /proc


def test_what_a_node_had_before_it_was_killed_is_not_missed_when_it_returns(tmp_path: Path) -> None:
    """A node is killed before all that its forwarder had sent got to the other one: that did not get lost.

    Only what it had published, and neither forwarder had, is counted.
    """
    sock, _ = open_receiver("127.0.0.1", 0)
    with closing(sock):
        port = sock.getsockname()[1]
        with forwarder(tmp_path, port) as before:
            before.publish(1, 0, 0)
            before.publish(1, 0, 100)
            before.tell("live")
            wait_until(before.is_level, "it serves")
        with forwarder(tmp_path, port) as after:
            after.publish(2, 0, 0)
            after.report(2, 0, _1=103)
            after.publish(2, 0, 10)
            places = Place(STREAM, INGEST, 1, 0, 90), Place(STREAM, INGEST, 2, 0, 4)
            after.tell("joining", *places)
            after.tell("live", *places)
            wait_until(after.is_level, "it serves")
            account = after.service._collectors.accounts()[f"collector/{NAME}"]
            assert (account["sent"], account[NOT_JOURNALED]) == (6, 3)


def test_a_node_that_nobody_stood_in_for_goes_on_where_it_has_left_off(tmp_path: Path) -> None:
    """A node serves nobody while it is not in the majority: its own collectors get what came then, once it serves.

    Another node may have sent that. Of what is no more there, all is counted.
    """
    sock, _ = open_receiver("127.0.0.1", 0)
    with closing(sock), forwarder(tmp_path, sock.getsockname()[1]) as node:
        node.publish(1, 0, 0)
        node.tell("live")
        wait_until(node.is_level, "it serves")
        node.publish(1, 0, 100)
        node.pass_time()
        node.tell("joining", other="silent", majority=False)
        node.pass_time()
        node.publish(1, 100, 30)
        node.pass_time()
        node.tell("joining", other="silent")
        node.pass_time()
        node.publish(1, 130, 5)
        node.tell("live", other="silent")
        wait_until(node.is_level, "it serves")
        node.publish(1, 135, 5)
        node.pass_time()
        account = node.service._collectors.accounts()[f"collector/{NAME}"]
        assert (account["expected"], account["sent"], account[PERHAPS_TWICE]) == (140, 140, 35)


@pytest.mark.parametrize("worker", [INGEST, "uplink.1"])
def test_what_came_before_the_first_node_joins_is_delivered_or_counted(worker: str, tmp_path: Path) -> None:
    """A node that joins while no other one lives sends its collectors what came meanwhile, and counts what it let go.

    Another node may have sent it, which was not heard.
    """
    sock, _ = open_receiver("127.0.0.1", 0)
    with closing(sock), forwarder(tmp_path, sock.getsockname()[1], "silent") as node:
        node.publish(1, 0, 0, worker)
        node.publish(1, 0, 100, worker)
        node.publish(1, 100, 30, worker)
        node.pass_time()
        window = node.service._catch_up.rings[STREAM]
        window.trim(window.size - 1)
        node.tell("live", other="silent")
        wait_until(node.is_level, "it serves")
        node.publish(1, 130, 5, worker)
        node.pass_time()
        account = node.service._collectors.accounts()[f"collector/{NAME}"]
        told = account["expected"], account["sent"], account[NOT_JOURNALED], account[PERHAPS_TWICE]
        assert told == (135, 35, 100, 30)


def test_what_a_node_took_in_that_was_killed_before_it_served_is_counted(tmp_path: Path) -> None:
    """A node is started, and killed before it serves: what the other one has not had of that is lost, and said."""
    sock, _ = open_receiver("127.0.0.1", 0)
    with closing(sock):
        port = sock.getsockname()[1]
        with forwarder(tmp_path, port) as before:
            before.publish(1, 0, 0)
            before.tell("joining")
            before.publish(1, 0, 100)
            before.pass_time()
        with forwarder(tmp_path, port) as after:
            after.publish(2, 0, 0)
            after.report(2, 0, _1=100)
            places = Place(STREAM, INGEST, 1, 0, 60), Place(STREAM, INGEST, 2, 0, 0)
            after.tell("joining", *places)
            after.tell("live", *places)
            wait_until(after.is_level, "it serves")
            account = after.service._collectors.accounts()[f"collector/{NAME}"]
            assert (account.get("sent", 0), account[NOT_JOURNALED]) == (0, 40)


def test_what_the_last_node_has_lacked_and_nobody_has_any_more_is_counted(tmp_path: Path) -> None:
    """A node takes a collector over from one that has lacked some of what others sent, long ago."""
    sock, _ = open_receiver("127.0.0.1", 0)
    with closing(sock), forwarder(tmp_path, sock.getsockname()[1]) as node:
        node.publish(1, 0, 0)
        node.publish(1, 0, 100)
        place = Place(STREAM, INGEST, 1, 0, 90, lacked=7)
        node.tell("joining", place)
        node.tell("live", place)
        wait_until(node.is_level, "it serves")
        account = node.service._collectors.accounts()[f"collector/{NAME}"]
        assert (account["expected"], account["sent"], account[NOT_JOURNALED]) == (17, 10, 7)
