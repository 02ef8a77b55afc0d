import socket
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import cast

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from services.forwarder.plan import UDP_SEGMENT
from services.ingest.batch_publisher import StreamFeed
from services.ingest.receiver import (
    BACK_OFF_SECONDS,
    FEW_ROWS,
    MAX_FAILURES,
    SMALLEST_STRIDE,
    DatagramReceiver,
    stride_for,
)
from shared.bus.loans.lender import CHUNK, Loan, Pool
from shared.bus.zmq_sockets import Publisher
from shared.datagrams.batch import ROW, DatagramBatch
from shared.datagrams.limits import MAX_DATAGRAM
from shared.datagrams.mmsg import SLOT, UDP_GRO, ReceiveArena
from shared.net.sockets import enlarge_receive_buffer
from tests.builders import BusEnds
from tests.stack import PATIENCE_SECONDS

sizes = st.sampled_from([1, 1464, 32_768, MAX_DATAGRAM - 1, MAX_DATAGRAM, MAX_DATAGRAM + 1, SLOT])


@given(sizes | st.integers(1, SLOT), st.booleans())
def test_stride_holds_datagrams_like_those_before(longest: int, equal: bool) -> None:
    """Equal datagrams stand end to end, others at a power of two less than twice the longest; none is beyond UDP's."""
    stride = stride_for(longest, equal=equal)
    assert min(longest, MAX_DATAGRAM) <= stride <= MAX_DATAGRAM
    if equal:
        assert stride == min(longest, MAX_DATAGRAM)
    elif stride < MAX_DATAGRAM:
        assert stride.bit_count() == 1
        assert stride == SMALLEST_STRIDE or stride < 2 * longest


def test_receive_that_only_fails_does_not_spin(lab: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Failures are counted and the next call goes on; when all fail, each waits a moment, until one succeeds."""
    naps: list[float] = []
    monkeypatch.setattr("services.ingest.receiver.time.sleep", naps.append)
    outcomes = ["fails"] * (MAX_FAILURES + 1) + ["nothing"] + ["fails"] * (MAX_FAILURES - 1)

    def receive(*_: object, **__: object) -> int:
        if outcomes.pop(0) == "fails":
            raise OSError(105, "No buffer space available")
        return 0

    monkeypatch.setattr(ReceiveArena, "receive", receive)
    listener: Counter[str] = Counter()
    with BusEnds(tmp_path) as bus, closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as sock:
        feed = StreamFeed("a", bus.publisher(), Counter())
        receiver = DatagramReceiver(sock, feed, listener, ReceiveArena(), None)
        while outcomes:
            assert receiver.receive() == (0, 0)
    assert naps == [BACK_OFF_SECONDS] * 2
    assert listener["receive_errors"] == feed.account["receive_errors"] == 2 * MAX_FAILURES


class Bus:
    """Takes what a feed publishes, as the parts of a message say it."""

    sender = "ingest.1"

    def __init__(self) -> None:
        self.taken: list[tuple[bytes, bytes]] = []

    def wanted(self, topic: str) -> bool:
        """Return whether somebody subscribes."""
        return topic.startswith("datagrams/")

    def publish(
        self,
        _topic: str,
        _body: object,
        batch: DatagramBatch | None = None,
        arrays: Sequence[bytes] = (),
        count: int = 0,
    ) -> bool:
        """Take rows and payload."""
        rows, payload = arrays or (b"", b"")
        if batch:
            batch.check()
            rows, payload = batch.rows.tobytes(), b"".join(payload for _, _, payload in batch.datagrams())
        assert batch or len(rows) == count * ROW.itemsize
        self.taken.append((rows, payload))
        return True


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["127.0.0.1", "::1"]),
    st.lists(st.tuples(st.sampled_from([0, 1, 100, 100, 200, 1464, 7000]), st.integers(0, 2)), min_size=1, max_size=72),
)
def test_few_are_received_as_many_are(lab: None, host: str, found: list[tuple[int, int]]) -> None:
    """One by one or as columns, the same datagrams give the same rows, payload and accounts."""
    outcomes = []
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with ExitStack() as opened:
        senders = [opened.enter_context(socket.socket(family, socket.SOCK_DGRAM)) for _ in range(3)]
        for few in (FEW_ROWS, 0):
            opened.enter_context(pytest.MonkeyPatch.context()).setattr("services.ingest.receiver.FEW_ROWS", few)
            sock = opened.enter_context(socket.socket(family, socket.SOCK_DGRAM))
            enlarge_receive_buffer(sock, 1 << 24)
            sock.bind((host, 0))
            for number, (size, sender) in enumerate(found):
                senders[sender].sendto(bytes([number + 1]) * size, sock.getsockname()[:2])
            bus, account = Bus(), Counter[str]()
            feed = StreamFeed("messages", cast(Publisher, bus), Counter())
            receiver = DatagramReceiver(sock, feed, account, ReceiveArena(), None)
            assert receiver.receive() == (len(found), sum(size for size, _ in found))
            outcomes.append((bus.taken, account, feed.account))
    assert outcomes[0] == outcomes[1]
    assert len(outcomes[0][0]) == 1


class Chunks:
    """Lends memory without an end, as a pool does whose borrowers are quick."""

    number = 0

    def lend(self) -> Loan:
        """Return a chunk."""
        return Loan(0, 0, memoryview(bytearray(CHUNK)))

    def lent(self, loan: Loan) -> None:
        """Take note of nothing."""


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["127.0.0.1", "::1"]),
    st.booleans(),
    st.lists(
        st.lists(
            st.tuples(
                st.sampled_from([1, 100, 1000, MAX_DATAGRAM + 20]),
                st.sampled_from([1, 2, 16, 64, 128]),
                st.sampled_from([0, 0, 30]),
                st.integers(0, 2),
            ),
            min_size=1,
            max_size=6,
        ),
        min_size=1,
        max_size=3,
    ),
    st.integers(1, 3),
)
def test_trains_are_received_as_their_datagrams_are(
    lab: None, host: str, lends: bool, turns: list[list[tuple[int, int, int, int]]], times: int
) -> None:
    """The same datagrams give the same rows in order, payload and accounts, as trains or one by one, some too long."""
    outcomes = []
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with ExitStack() as opened:
        senders = [opened.enter_context(socket.socket(family, socket.SOCK_DGRAM)) for _ in range(3)]
        for trains in (True, False):
            sock = opened.enter_context(socket.socket(family, socket.SOCK_DGRAM))
            enlarge_receive_buffer(sock, 1 << 25)
            sock.bind((host, 0))
            bus, account = Bus(), Counter[str]()
            feed = StreamFeed("messages", cast(Publisher, bus), Counter(), cast(Pool, Chunks()) if lends else None)
            receiver = DatagramReceiver(sock, feed, account, ReceiveArena(), None, trains=trains)
            for sent in turns:
                for number, (segment, count, missing, sender) in enumerate(sent * times):
                    if segment > MAX_DATAGRAM:  # by IPv6 alone, and alone
                        segment, count, missing = (0, 1, 0) if family == socket.AF_INET6 else (1, 1, 0)
                    size = min(segment * count, 65_000) - min(missing, segment - 1) if segment else MAX_DATAGRAM + 20
                    payload = (bytes(range(number, 251)) * (1 + size // 200))[:size]
                    try:
                        senders[sender].setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, segment)
                        senders[sender].sendto(payload, sock.getsockname()[:2])
                    except OSError:  # Linux before 6.8 takes 64 at once
                        assume(count <= 64)
                        raise
                while receiver.receive() != (0, 0):
                    pass
            rows, payloads = b"".join(rows for rows, _ in bus.taken), b"".join(payload for _, payload in bus.taken)
            outcomes.append((rows, payloads, account, feed.account))
    assert outcomes[0] == outcomes[1]


def test_a_train_comes_as_one_piece_where_it_is_taken(lab: None) -> None:
    """A train takes one place in the queue; the kernel counts it as one when it is dropped, as the setting says."""
    with ExitStack() as opened:
        sock, sender = (opened.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) for _ in range(2))
        sock.bind(("127.0.0.1", 0))
        bus, account = Bus(), Counter[str]()
        feed = StreamFeed("messages", cast(Publisher, bus), Counter())
        receiver = DatagramReceiver(sock, feed, account, ReceiveArena(), None, trains=True)
        sender.connect(sock.getsockname())
        sender.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, 1000)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        for _ in range(20):
            sender.send(bytes(16_000))
        while receiver.receive() != (0, 0):
            pass
        receiver.count_kernel_drops()
    assert 0 < account["received"] < 320
    assert account["received"] + 16 * account["kernel_dropped"] == 320


def test_trains_follow_the_stream_that_a_listener_serves(lab: None) -> None:
    """A listener takes trains from the reload on that asks for them, and goes on with it; it answers none of them."""
    with ExitStack() as opened:
        sock, sender = (opened.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) for _ in range(2))
        sock.bind(("127.0.0.1", 0))
        sender.connect(sock.getsockname())
        sender.settimeout(PATIENCE_SECONDS)
        bus, account = Bus(), Counter[str]()
        feed = StreamFeed("messages", cast(Publisher, bus), Counter())
        receiver = DatagramReceiver(sock, feed, account, ReceiveArena(), None)
        assert not sock.getsockopt(socket.IPPROTO_UDP, UDP_GRO)
        receiver.assign_stream(feed, account, None, trains=True)
        assert sock.getsockopt(socket.IPPROTO_UDP, UDP_GRO)
        receiver.assign_stream(feed, account, b"Got it")
        sender.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, 100)
        sender.send(bytes(1000))
        sender.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, 0)
        assert receiver.receive() == (10, 1000)
        sender.send(b"alone")
        assert receiver.receive() == (1, 5)
        assert sender.recv(16) == b"Got it"
    assert [len(payload) for _, payload in bus.taken] == [1000, 5]
    assert (feed.account["replied"], feed.account["reply_failed"]) == (1, 10)
