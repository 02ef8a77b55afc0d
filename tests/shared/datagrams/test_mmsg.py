import errno
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared.datagrams.batch import DatagramBatch
from shared.datagrams.limits import MAX_ROWS
from shared.datagrams.mmsg import IOVEC, MMSGHDR, SLOT, ReceiveArena, addresses_of, send
from shared.net.addresses import unpack_address
from shared.net.sockets import enlarge_receive_buffer
from tests.refusing import refuse

SIZES = (0, 1, 1464, 65507)
LOOPBACK = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}


@pytest.fixture
def sockets(lab: None) -> Iterator[ExitStack]:
    """Closes every socket that a test enters into it."""
    with ExitStack() as opened:
        yield opened


def bound(sockets: ExitStack, family: socket.AddressFamily, host: str = "") -> socket.socket:
    """A socket bound to loopback, or to `host`."""
    sock = sockets.enter_context(socket.socket(family, socket.SOCK_DGRAM))
    enlarge_receive_buffer(sock, 16 << 20)
    if host == "::":
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    sock.bind((host or LOOPBACK[family], 0))
    return sock


def connected(sockets: ExitStack, receiver: socket.socket, family: socket.AddressFamily) -> socket.socket:
    """A bound socket that sends to `receiver`."""
    sock = bound(sockets, family)
    sock.connect((LOOPBACK[family], receiver.getsockname()[1]))
    return sock


def received(arena: ReceiveArena, sock: socket.socket) -> DatagramBatch:
    """Return the datagrams of one receive call, as a batch."""
    sock.settimeout(60)
    sock.recv(0, socket.MSG_PEEK)
    count = arena.receive(sock.fileno())
    batch = DatagramBatch("messages", 0, arena.rows(count, sock.family), arena.payload(0, count))
    assert batch.lengths.tolist() == arena.lengths(count).tolist()
    arena.restore(count)
    batch.check()
    return batch


def headers_for(payloads: list[bytes]) -> tuple[np.ndarray[tuple[int], np.dtype[np.void]], list[object]]:
    """A sendmmsg vector for a connected socket, and what has to be kept alive for it."""
    buffers = [np.frombuffer(payload or b"\0", np.uint8) for payload in payloads]
    pairs = [(buffer.ctypes.data, len(payload)) for buffer, payload in zip(buffers, payloads, strict=True)]
    iovecs = np.array(pairs, IOVEC)
    headers = np.zeros(len(payloads), MMSGHDR)
    headers["iov"], headers["iovlen"] = addresses_of(iovecs, IOVEC.itemsize, len(payloads)), 1
    return headers, [iovecs, buffers]


@pytest.mark.parametrize(
    ("host", "sender"),
    [
        ("127.0.0.1", socket.AF_INET),
        ("::1", socket.AF_INET6),
        ("::", socket.AF_INET),
        ("::", socket.AF_INET6),
    ],
)
@pytest.mark.parametrize("lengths", [SIZES, (1464,) * 64, (0,) * 3, (1, 0, 65507, 0, 0, 1464, 1464, 65507)])
def test_rows_and_payload_are_what_was_sent(
    sockets: ExitStack, host: str, sender: socket.AddressFamily, lengths: tuple[int, ...]
) -> None:
    """Ragged and equal runs of every size arrive with sender's address and port, over IPv4, IPv6 and dual-stack."""
    receiver = bound(sockets, socket.AF_INET6 if ":" in host else socket.AF_INET, host)
    source = connected(sockets, receiver, sender)
    payloads = [bytes([number]) * length for number, length in enumerate(lengths)]
    for payload in payloads:
        source.send(payload)
    batch = received(ReceiveArena(), receiver)
    address, port = source.getsockname()[:2]
    assert list(batch.datagrams()) == [(address, port, payload) for payload in payloads]


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from([0, 1, 2, 1464, 9000]) | st.integers(0, 65507), min_size=1, max_size=20))
def test_arena_is_good_for_any_sequence_of_sizes(lab: None, lengths: list[int]) -> None:
    """Bytes that an earlier call left in the arena never show in a later one."""
    arena = ReceiveArena()
    with ExitStack() as opened:
        receiver = bound(opened, socket.AF_INET)
        source = connected(opened, receiver, socket.AF_INET)
        for mark in (b"a", b"b"):
            payloads = [mark * length for length in lengths]
            for payload in payloads:
                source.send(payload)
            assert [payload for _, _, payload in received(arena, receiver).datagrams()] == payloads
            lengths.reverse()


def test_datagram_that_was_cut_is_counted(sockets: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    """None is cut, whatever its size; in an arena whose slots are too small the kernel's flag tells which were."""
    receiver = bound(sockets, socket.AF_INET)
    source = connected(sockets, receiver, socket.AF_INET)
    for slot, cut in ((SLOT, 0), (2048, 2)):
        monkeypatch.setattr("shared.datagrams.mmsg.SLOT", slot)
        arena = ReceiveArena()
        for size in (0, 2048, 2049, 65507, 5):
            source.send(bytes(size))
        receiver.recv(0, socket.MSG_PEEK)
        assert arena.receive(receiver.fileno()) == 5
        assert arena.truncated(5) == cut
        arena.restore(5)


GUARD = 0xA5
"""The byte in a place where nothing was received."""


def fitting(lengths: list[int], most: int) -> list[int]:
    """Return as many of these lengths as a socket's buffer holds, and as one call takes."""
    room, found = 8 << 20, list[int]()
    for length in lengths[:most]:
        room -= length + 2048
        if room < 0:
            break
        found.append(length)
    return found


strides = st.sampled_from([1, 256, 1464, 1500, 2048, 65507]) | st.integers(1, 65507)
around_stride = st.sampled_from(["less", "equal", "more", "any", "none", "longest", "one"])


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    strides,
    st.lists(st.tuples(around_stride, st.integers(0, 1 << 20)), min_size=1, max_size=30),
    st.integers(0, 4096),
    st.integers(0, 2000),
    st.booleans(),
)
def test_place_gets_what_was_sent_and_nothing_else(
    lab: None, stride: int, kinds: list[tuple[str, int]], spare: int, shift: int, again: bool
) -> None:
    """Datagrams no longer than the stride are in place, all are by `payload`, and no byte beside them is written."""
    sizes = {"equal": stride, "none": 0, "longest": 65507, "one": 1}
    ranges = {"less": (0, stride), "more": (stride, 65507), "any": (0, 65507)}
    lengths = [
        sizes[kind] if kind in sizes else ranges[kind][0] + draw % (ranges[kind][1] - ranges[kind][0] + 1)
        for kind, draw in kinds
    ]
    room = len(lengths) * stride + spare % stride
    arena = ReceiveArena()
    with ExitStack() as opened:
        receiver, other = bound(opened, socket.AF_INET), bound(opened, socket.AF_INET6)
        source = connected(opened, receiver, socket.AF_INET)
        if again:  # what an earlier call left must not show
            second = connected(opened, other, socket.AF_INET6)
            for length in reversed(fitting(lengths, len(lengths))):
                second.send(b"z" * length)
            received(arena, other)
        lengths = fitting(lengths, len(lengths))
        payloads = [(b"%d," % number * (length // 2 + 1))[:length] for number, length in enumerate(lengths)]
        for payload in payloads:
            source.send(payload)
        memory = memoryview(bytearray([GUARD]) * (shift + room + sum(lengths)))
        count = arena.receive(receiver.fileno(), memory[shift : shift + room], stride)
        assert count == len(payloads)
        assert arena.lengths(count).tolist() == lengths
        expected = bytearray([GUARD]) * len(memory)
        for number, payload in enumerate(payloads):
            at = shift + number * stride
            expected[at : at + min(len(payload), stride)] = payload[:stride]
        assert memory == expected
        rows = arena.rows(count, socket.AF_INET)
        if max(lengths) <= stride:
            batch = DatagramBatch("messages", 0, rows, memory[shift : shift + count * stride], stride)
            batch.check()
            assert list(batch.datagrams()) == [(*source.getsockname()[:2], payload) for payload in payloads]
        middle = count // 2
        joined = b"".join(payloads)
        before = sum(lengths[:middle])
        assert arena.payload(0, count) == joined
        if middle:
            assert arena.payload(0, middle) == joined[:before]
        copied = arena.payload(middle, count)
        memory[:] = bytes(len(memory))  # what is put where they were received was read before
        assert copied == arena.payload(middle, count) == joined[before:]
        arena.restore(count)
        source.send(b"next")
        assert [payload for _, _, payload in received(arena, receiver).datagrams()] == [b"next"]


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 3000), st.integers(1, 20), st.data())
def test_equal_payloads_are_copied_end_to_end(lab: None, length: int, count: int, data: st.DataObject) -> None:
    """Without a place any neighbours of equal length are copied at once, end to end."""
    arena = ReceiveArena()
    with ExitStack() as opened:
        receiver = bound(opened, socket.AF_INET)
        source = connected(opened, receiver, socket.AF_INET)
        payloads = [bytes([number]) * length for number in range(count)]
        for payload in payloads:
            source.send(payload)
        assert arena.receive(receiver.fileno()) == count
        start = data.draw(st.integers(0, count - 1))
        stop = data.draw(st.integers(start + 1, count))
        assert arena.payload(start, stop) == b"".join(payloads[start:stop])


@pytest.mark.parametrize("rows", [1, 3])
def test_place_takes_as_many_as_it_has_room_for(sockets: ExitStack, rows: int) -> None:
    """A call takes no more datagrams than there are whole strides in the place; the rest is there for the next."""
    receiver = bound(sockets, socket.AF_INET)
    source = connected(sockets, receiver, socket.AF_INET)
    for number in range(5):
        source.send(b"%d" % number)
    arena, place = ReceiveArena(), memoryview(bytearray(rows * 100 + 99))
    assert arena.receive(receiver.fileno(), place, 100) == rows
    assert bytes(place[::100][:rows]) == b"01234"[:rows]
    arena.restore(rows)
    assert arena.receive(receiver.fileno()) == 5 - rows


def test_call_takes_at_most_a_batch(sockets: ExitStack) -> None:
    """One call brings as many as a batch has, the next one the rest, and with nothing there it brings none."""
    receiver = bound(sockets, socket.AF_INET)
    source = connected(sockets, receiver, socket.AF_INET)
    for number in range(MAX_ROWS + 1):
        source.send(b"%d" % number)
    arena = ReceiveArena()
    payloads = [payload for _ in range(2) for _, _, payload in received(arena, receiver).datagrams()]
    assert payloads == [b"%d" % number for number in range(MAX_ROWS + 1)]
    assert arena.receive(receiver.fileno()) == 0


def test_sources_are_told_apart_within_a_call(sockets: ExitStack) -> None:
    """Each row has the address and port of its own sender, IPv4 mapped, whatever the one before had."""
    receiver = bound(sockets, socket.AF_INET6, "::")
    senders = [connected(sockets, receiver, family) for family in (socket.AF_INET, socket.AF_INET6) * 3]
    for sender in senders:
        sender.send(b"x")
    rows = received(ReceiveArena(), receiver).rows
    assert [(unpack_address(row["address"].tobytes()), int(row["port"])) for row in rows] == [
        sender.getsockname()[:2] for sender in senders
    ]


def test_one_arena_serves_all_sockets(sockets: ExitStack) -> None:
    """After a call on a socket of another family every address is whole, and none is left over."""
    arena = ReceiveArena()
    receivers = {family: bound(sockets, family) for family in LOOPBACK}
    for family in (socket.AF_INET, socket.AF_INET6) * 3:
        source = connected(sockets, receivers[family], family)
        source.send(b"x")
        assert list(received(arena, receivers[family]).datagrams()) == [(*source.getsockname()[:2], b"x")]
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        with ours, theirs:
            theirs.send(b"y")
            assert list(received(arena, ours).datagrams()) == [("::", 0, b"y")]


def test_path_sender_has_no_address(sockets: ExitStack) -> None:
    """Datagrams of AF_UNIX have zero addresses, whether their sender is bound to a path or to none."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs:
        theirs.send(b"one")
        theirs.send(b"")
        batch = received(ReceiveArena(), ours)
    assert list(batch.datagrams()) == [("::", 0, b"one"), ("::", 0, b"")]


def test_longer_than_any_datagram_fills_its_slot(sockets: ExitStack) -> None:
    """A longer one than UDP can carry, which AF_UNIX allows, is seen by its length, which then is that of a slot."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs:
        for size in (SLOT - 1, SLOT, SLOT + 1, 100_000):
            theirs.send(bytes(size))
        arena = ReceiveArena()
        count = arena.receive(ours.fileno())
        assert arena.lengths(count).tolist() == [SLOT - 1, SLOT, SLOT, SLOT]


def test_receive_error_is_the_kernels(sockets: ExitStack) -> None:
    """A receive call that fails raises OSError with the kernel's errno."""
    receiver = bound(sockets, socket.AF_INET)
    nobody = connected(sockets, receiver, socket.AF_INET)
    receiver.close()
    nobody.send(b"x")
    with pytest.raises(ConnectionRefusedError):
        ReceiveArena().receive(nobody.fileno())
    with pytest.raises(OSError, match="Bad file descriptor"):
        ReceiveArena().receive(-1)


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_send_takes_a_range_of_the_vector(sockets: ExitStack, family: socket.AddressFamily) -> None:
    """Messages `start` to `stop` are sent in order, no others, and the count is theirs."""
    receiver = bound(sockets, family)
    source = connected(sockets, receiver, family)
    headers, _alive = headers_for([b"no", b"", b"one", bytes(65507), b"no"])
    assert send(source.fileno(), headers, 1, 4) == (3, 0)
    batch = received(ReceiveArena(), receiver)
    assert [payload for _, _, payload in batch.datagrams()] == [b"", b"one", bytes(65507)]
    assert headers["len"].tolist() == [0, 0, 3, 65507, 0]


def test_send_to_a_closed_port_tells_the_refusal(sockets: ExitStack) -> None:
    """The answer to an earlier datagram is the error of the next call, which sends nothing; the call after sends."""
    receiver = bound(sockets, socket.AF_INET)
    source = connected(sockets, receiver, socket.AF_INET)
    receiver.close()
    headers, _alive = headers_for([b"x"] * 2)
    assert send(source.fileno(), headers, 0, 1) == (1, 0)
    assert send(source.fileno(), headers, 0, 1) == (0, errno.ECONNREFUSED)
    assert send(source.fileno(), headers, 0, 1) == (1, 0)


def test_send_stops_at_the_message_that_fails(sockets: ExitStack) -> None:
    """An error in the middle shows as fewer taken; the call that begins with that message gives its errno."""
    receiver = bound(sockets, socket.AF_INET)
    source = connected(sockets, receiver, socket.AF_INET)
    headers, _alive = headers_for([b"one", bytes(65508), b"two"])
    assert send(source.fileno(), headers, 0, 3) == (1, 0)
    assert send(source.fileno(), headers, 1, 3) == (0, errno.EMSGSIZE)
    assert send(source.fileno(), headers, 2, 3) == (1, 0)


def test_send_does_not_wait_for_room(sockets: ExitStack) -> None:
    """With the way out full a call takes what fits, and the next one says EAGAIN."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs:
        headers, _alive = headers_for([bytes(60_000)] * MAX_ROWS)
        taken, error = send(ours.fileno(), headers, 0, MAX_ROWS)
        assert error == 0
        assert 0 < taken < MAX_ROWS
        assert send(ours.fileno(), headers, taken, MAX_ROWS) == (0, errno.EAGAIN)


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_refused_sendmmsg_is_replaced(sockets: ExitStack, family: socket.AddressFamily) -> None:
    """Messages are sent one by one where a sandbox refuses sendmmsg(2), and errors are told as by the kernel's call."""
    receiver = bound(sockets, family)
    sock = connected(sockets, receiver, family)
    headers, _kept = headers_for([b"one", b"", b"x" * 65_536, b"four"])

    def send_refused() -> list[tuple[int, int]]:
        refuse("sendmmsg=ENOSYS")  # to this thread alone
        return [send(sock.fileno(), headers, start, 4) for start in (0, 2, 3)]

    with ThreadPoolExecutor(1) as other_thread:
        assert other_thread.submit(send_refused).result() == [(2, 0), (0, errno.EMSGSIZE), (1, 0)]
    receiver.settimeout(60)
    assert [receiver.recv(100) for _ in range(3)] == [b"one", b"", b"four"]
