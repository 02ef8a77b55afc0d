import selectors
import socket
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from services.ingest.batch_publisher import StreamFeed
from services.ingest.tcp_connections import READ_SIZE, SHORT_READ_SIZE, ExporterConnection, ExporterConnections
from shared.ledger.counters import RECEIVED
from shared.settings.tables import Ingest
from tests.builders import BusEnds

SENDERS = 20
LINES = b"x\n" * 32_768


@pytest.fixture
def opened(lab: None) -> Iterator[ExitStack]:
    """Closes what a test enters into it."""
    with ExitStack() as everything:
        yield everything


def test_a_turn_reads_some_and_the_next_the_others(opened: ExitStack, tmp_path: Path) -> None:
    """Connections with more to say than a turn has time for are read in turn, none before all others had theirs."""
    publisher = opened.enter_context(BusEnds(tmp_path)).publisher("ingest.1")
    selector = opened.enter_context(selectors.DefaultSelector())
    connections = ExporterConnections(selector, Ingest())
    opened.callback(lambda: connections.close(0))
    feeds = [StreamFeed(f"s{number}", publisher, Counter()) for number in range(SENDERS)]
    for feed in feeds:  # a stream and a listener for each connection, so that its messages are counted by themselves
        listener = socket.create_server(("127.0.0.1", 0))
        listener.setblocking(False)
        connections.listen(listener, feed, Counter())
        sender = opened.enter_context(socket.create_connection(listener.getsockname()))
        for key, _ in selector.select(10):
            key.data()
        sender.sendall(LINES)

    def turn() -> list[int]:
        for key, _ in selector.select(0):
            key.data()
        connections.read_due()
        return [feed.account[RECEIVED] for feed in feeds]

    counts = turn()
    assert 0 < sum(map(bool, counts)) < SENDERS, "one turn read from all of them, or from none"
    while not all(counts):
        before, counts = counts, turn()
        again = [late - early for early, late in zip(before, counts, strict=True) if early and late > early]
        assert not again or all(counts), "one was read again before another was read at all"
    while min(counts) < len(LINES) // 2:
        counts = turn()


def test_short_messages_are_read_in_small_pieces(opened: ExitStack, tmp_path: Path) -> None:
    """A connection whose messages are a byte long is read in small pieces, as each costs; with long ones in large."""
    account: Counter[str] = Counter()
    feed = StreamFeed("s", opened.enter_context(BusEnds(tmp_path)).publisher("ingest.1"), Counter())
    ours, sender = (opened.enter_context(each) for each in socket.socketpair())
    connection = ExporterConnection(ours, ("127.0.0.1", 1), feed, account, ours)

    def read() -> int:
        before = account[RECEIVED]
        assert connection.read()
        return account[RECEIVED] - before

    sender.sendall(b"x\n" * READ_SIZE)
    assert [read() for _ in range(3)] == [READ_SIZE // 2, SHORT_READ_SIZE // 2, SHORT_READ_SIZE // 2]
    while account[RECEIVED] < READ_SIZE:
        read()
    long = b"x" * 127 + b"\n"
    sender.sendall(long * 200)
    assert [read() for _ in range(2)] == [SHORT_READ_SIZE // 128, READ_SIZE // 128]


def test_silent_connection_that_speaks_as_it_expires(opened: ExitStack, tmp_path: Path) -> None:
    """A message that comes as its connection would expire counts; one that closes then ends once, and is no expiry."""
    publisher = opened.enter_context(BusEnds(tmp_path)).publisher("ingest.1")
    selector = opened.enter_context(selectors.DefaultSelector())
    connections = ExporterConnections(selector, Ingest(tcp_idle_seconds=0.1))
    opened.callback(lambda: connections.close(0))
    feed, listener = StreamFeed("s", publisher, Counter()), socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    connections.listen(listener, feed, Counter())
    speaker, closer, silent = (opened.enter_context(socket.create_connection(listener.getsockname())) for _ in range(3))
    for key, _ in selector.select(10):
        key.data()
    time.sleep(0.2)
    speaker.send(b"one\n")
    closer.close()
    keys = {key for key, _ in selector.select(10)}
    while len(keys) < 2:
        keys |= {key for key, _ in selector.select(10)}
    connections.expire()
    assert silent.recv(1) == b""
    for key in keys:
        key.data()
    connections.read_due()
    speaker.send(b"two\n")
    while feed.account[RECEIVED] < 2:
        for key, _ in selector.select(10):
            key.data()
        connections.read_due()
    assert feed.account["connections_expired"] == 1
