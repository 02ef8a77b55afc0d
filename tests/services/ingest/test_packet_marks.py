import socket
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.forwarder.plan import UDP_SEGMENT
from services.ingest import receiver as receiving
from services.ingest.batch_publisher import StreamFeed
from services.ingest.packet_marks import SO_RCVMARK, SO_RXQ_OVFL, MarkReader
from services.ingest.receiver import DatagramReceiver
from shared.bus.loans.lender import CHUNK, Loan, Pool
from shared.bus.messages import Datagrams, hold_topic
from shared.bus.publishing.held_batches import HeldBatches
from shared.bus.zmq_sockets import Publisher
from shared.datagrams.batch import DatagramBatch, read_generations, read_rows
from shared.datagrams.limits import MAX_DATAGRAM
from shared.datagrams.mmsg import SO_MARK, ReceiveArena
from shared.net.sockets import InheritedSocket, enlarge_receive_buffer
from shared.settings.tables import Offload
from tests.builders import BusEnds, accounts_when
from tests.stack import PATIENCE_SECONDS, Stack

OFFLOAD = Offload(interfaces=("eth0",), mark_mask=0x0FFF0000)
OTHERS = 0xF000FFFF
"""Bits of marks that are somebody else's."""
Sent = tuple[int, int, int]
"""Mark, length, and how many of that length leave as a train; 0: one by itself."""


class Bus:
    """Takes what a feed publishes: generation and payload of each datagram, as a message tells them."""

    sender = "ingest.1"

    def __init__(self) -> None:
        self.taken: list[tuple[int, bytes]] = []
        self.again: list[Any] = []

    def wanted(self, topic: str) -> bool:
        """Return whether somebody subscribes."""
        return topic.startswith("datagrams/")

    def position(self, _topic: str) -> tuple[int, int]:
        """Return the numbers of what was published."""
        return len(self.taken), len(self.taken)

    def repeat(self, _topic: str, body: Any, _sequence: int, _total: int, arrays: Any) -> bool:
        """Take a batch that was held."""
        self.again.append((body, arrays))
        return True

    def publish(
        self, _topic: str, body: Datagrams, batch: DatagramBatch | None = None, arrays: Any = (), count: int = 0
    ) -> bool:
        """Take a batch."""
        if batch is None:
            batch = DatagramBatch(body.stream, 0, read_rows(arrays[0]), arrays[1])
        generations = read_generations(len(batch), body.generation, body.generations)
        assert not count or count == len(batch)
        column = [0] * len(batch) if generations is None else generations.tolist()
        self.taken += zip(column, (bytes(payload) for _, _, payload in batch.datagrams()), strict=True)
        return True


class Chunks:
    """Lends memory without an end, as a pool does whose borrowers are quick."""

    number = 0

    def lend(self) -> Loan:
        """Return a chunk."""
        return Loan(0, 0, memoryview(bytearray(CHUNK)))

    def lent(self, loan: Loan) -> None:
        """Take note of nothing."""


def send_marked(sock: socket.socket, mark: int, payload: bytes, segment: int = 0) -> None:
    """Send with this mark: over loopback it stays on what is sent."""
    sock.setsockopt(socket.SOL_SOCKET, SO_MARK, mark.to_bytes(4, "little"))
    sock.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, segment)
    sock.send(payload)


marks = st.sampled_from([0, 0, OTHERS, 0x00010000, 0x00010000 | OTHERS, 0x00020000, 0x0FFF0000, 0xFFFFFFFF])
lengths = st.sampled_from([0, 1, 100, 100, 1000, 9000, MAX_DATAGRAM + 20])
some = st.tuples(marks, lengths, st.sampled_from([0, 0, 0, 2, 16]))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["127.0.0.1", "::1"]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([0, 64]),
    st.lists(st.lists(st.tuples(some, st.integers(1, 40)), min_size=1, max_size=6), min_size=1, max_size=3),
)
def test_each_datagram_goes_on_with_the_generation_of_its_mark(
    lab: None, host: str, trains: bool, lends: bool, few: int, turns: list[list[tuple[Sent, int]]]
) -> None:
    """In order, however it comes: few or many, lent or not, in trains, beside others that are too long.

    Of the mark the bits of the mask alone count.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    expected: list[tuple[int, bytes]] = []
    refused: list[int] = []
    with ExitStack() as opened:
        opened.enter_context(pytest.MonkeyPatch.context()).setattr(receiving, "FEW_ROWS", few)
        sock, sender = (opened.enter_context(socket.socket(family, socket.SOCK_DGRAM)) for _ in range(2))
        enlarge_receive_buffer(sock, 1 << 26)
        sock.bind((host, 0))
        sender.connect(sock.getsockname()[:2])
        bus, account = Bus(), Counter[str]()
        counts = Counter[str]()
        feed = StreamFeed("messages", cast(Publisher, bus), counts, cast(Pool, Chunks()) if lends else None)
        reader = MarkReader(OFFLOAD, account)
        receiver = DatagramReceiver(sock, feed, Counter(), ReceiveArena(), None, trains=trains, marks=reader)
        assert receiver.reads_marks
        for turn in turns:
            for (mark, size, together), times in turn:
                length = size if family == socket.AF_INET6 else min(size, MAX_DATAGRAM)
                for _ in range(times):
                    segments = together if 0 < length <= 1000 else 0
                    payload = bytes([len(expected) % 256]) * length
                    send_marked(sender, mark, payload * (segments or 1), length if segments else 0)
                    generation = (mark & 0x0FFF0000) >> 16
                    if length > MAX_DATAGRAM:
                        refused.append(generation)
                    else:
                        expected += [(generation, payload)] * (segments or 1)
            while receiver.receive() != (0, 0):
                pass
    assert bus.taken == expected
    assert account == {}
    assert counts["dropped_oversized"] == len(refused)
    if not trains:
        assert counts["marks_read"] == sum(generation > 0 for generation in [*refused, *(one for one, _ in expected)])


def test_marks_are_read_only_where_the_kernel_may_copy(lab: None) -> None:
    """Without interfaces in the settings, and at a path, no mark is asked for; what is marked goes on without."""
    with ExitStack() as opened:
        sock, sender = (opened.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) for _ in range(2))
        path = opened.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        sock.bind(("127.0.0.1", 0))
        sender.connect(sock.getsockname())
        bus, account = Bus(), Counter[str]()
        feed = StreamFeed("messages", cast(Publisher, bus), Counter())
        at_path = DatagramReceiver(path, feed, Counter(), ReceiveArena(), None, marks=MarkReader(OFFLOAD, account))
        receiver = DatagramReceiver(sock, feed, Counter(), ReceiveArena(), None, marks=MarkReader(Offload(), account))
        assert (at_path.reads_marks, receiver.reads_marks) == (None, False)
        assert not sock.getsockopt(socket.SOL_SOCKET, SO_RCVMARK)
        send_marked(sender, 0xFFFFFFFF, b"a")
        assert receiver.receive() == (1, 1)
    assert bus.taken == [(0, b"a")]
    assert account == {}


def test_socket_that_was_passed_tells_marks_alone(lab: None) -> None:
    """Other facts that its passer has asked the kernel to tell of each datagram would stand in front of the mark."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sock = InheritedSocket(socket.AF_INET, socket.SOCK_DGRAM)
        with sock:
            sock.bind(("127.0.0.1", 0))
            sender.connect(sock.getsockname())
            for option in (29, 35, SO_RXQ_OVFL):
                sock.setsockopt(socket.SOL_SOCKET, option, 1)
            sock.setsockopt(socket.IPPROTO_IP, 8, 1)  # IP_PKTINFO, which comes behind
            bus, account = Bus(), Counter[str]()
            feed, reader = StreamFeed("messages", cast(Publisher, bus), Counter()), MarkReader(OFFLOAD, account)
            receiver = DatagramReceiver(sock, feed, Counter(), ReceiveArena(), None, marks=reader)
            for mark in (0, 0x00030000):
                send_marked(sender, mark, b"a")
            assert receiver.receive() == (2, 2)
            sock.setsockopt(socket.SOL_SOCKET, 29, 1)  # by whoever still has it
            send_marked(sender, 0x00030000, b"b")
            assert receiver.receive() == (1, 1)
    assert bus.taken == [(0, b"a"), (3, b"a"), (0, b"b")]
    assert account == {"marks_unread": 1}


def test_replies_leave_without_the_mark_of_what_they_answer(lab: None) -> None:
    """A datagram whose mark is read is answered all the same: a reply bears none, which would need a privilege."""
    with ExitStack() as opened:
        sock, sender = (opened.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) for _ in range(2))
        sock.bind(("127.0.0.1", 0))
        sender.connect(sock.getsockname())
        sender.settimeout(PATIENCE_SECONDS)
        sender.setsockopt(socket.SOL_SOCKET, SO_RCVMARK, 1)
        feed = StreamFeed("messages", cast(Publisher, Bus()), Counter())
        reader = MarkReader(Offload(interfaces=("lo",)), Counter())
        receiver = DatagramReceiver(sock, feed, Counter(), ReceiveArena(), b"Got it", marks=reader)
        assert receiver.reads_marks
        send_marked(sender, 7, b"a")
        assert receiver.receive() == (1, 1)
        reply, told, *_ = sender.recvmsg(16, 64)
    assert (reply, feed.account["replied"], feed.account["reply_failed"]) == (b"Got it", 1, 0)
    assert told == [(socket.SOL_SOCKET, SO_MARK, bytes(4))]


def test_kernel_that_tells_no_marks_is_said(
    lab: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A listener whose kernel refuses to tell marks says so, works on, and is counted as blind: no rules go in."""
    monkeypatch.setattr("services.ingest.packet_marks.SO_RCVMARK", 0xFFFF)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        account = Counter[str]()
        reader, feed = MarkReader(OFFLOAD, account), StreamFeed("messages", cast(Publisher, Bus()), Counter())
        receiver = DatagramReceiver(sock, feed, Counter(), ReceiveArena(), None, marks=reader)
        reader.count_sockets([receiver.reads_marks, None, True, True])
    assert account == {"mark_sockets": 2, "mark_blind": 1}
    assert "can't read marks: the kernel makes no copies of what this listener receives" in capsys.readouterr().out


def test_batches_that_are_held_keep_their_generations() -> None:
    """A batch that waits for the successor of a sender tells then by which rules it was copied, as it did at first."""
    bus = Bus()
    held = HeldBatches(cast(Publisher, bus), 100)
    held.heed([hold_topic("forwarder.1.a")], ["messages"])
    feed = StreamFeed("messages", cast(Publisher, bus), Counter(), held=held)
    payload, rows = b"", np.zeros(3, [("length", "<u2"), ("port", "<u2"), ("address", "u1", (16,))])
    feed.publish(0, rows, payload, copied=np.array([7, 7, 7], np.uint16))
    feed.publish(0, rows, payload, copied=np.array([0, 7, 8], np.uint16))
    feed.publish(0, rows, payload)
    feed.publish_few(0, 3, rows.tobytes(), payload, np.array([9, 9, 9], np.uint16))
    held.heed(["again/ingest.1/forwarder.1.a/"], [])
    held.hand_on(short=False)
    bodies = [body for body, arrays in bus.again if arrays[0]]
    again = [read_generations(3, body.generation, body.generations) for body in bodies]
    assert [None if each is None else each.tolist() for each in again] == [[7, 7, 7], [0, 7, 8], None, [9, 9, 9]]
    assert [each for each, _ in bus.taken] == [7, 7, 7, 0, 7, 8, 0, 0, 0, 9, 9, 9]


def test_worker_tells_on_how_many_sockets_it_reads_marks(stack: Stack, tmp_path: Path) -> None:
    """Its status says so, of UDP alone, where the kernel may copy: before, no rules go in."""
    stack.configure(
        '[offload]\ninterfaces = ["lo"]\n[[stream]]\nname = "messages"\n'
        f'listen = ["udp://127.0.0.1:6667", "udp://[::1]:6667", "tcp://127.0.0.1:6667", "unixgram://{tmp_path}/s"]\n'
    )
    for name in ("broker", "ingest"):
        stack.start(name)
    with BusEnds(stack.bus) as bus:
        accounts = accounts_when(bus, "ingest.1", lambda accounts: accounts["ingest"].get("mark_sockets"))
    assert (accounts["ingest"]["mark_sockets"], accounts["ingest"]["mark_blind"]) == (2, 0)
