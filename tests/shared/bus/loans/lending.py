"""A worker's side of shared memory, driven by a test: nothing happens in it between two calls."""

import selectors
import socket
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Self

import pytest

import shared.bus.loans.lender
from services.ingest.batch_publisher import StreamFeed
from shared.bus.loans.lender import CHUNK, GRACE_SECONDS, Lender, Pool, pool_path
from shared.bus.messages import inline_topic
from shared.bus.zmq_sockets import Subscriber
from shared.datagrams.batch import DatagramBatch
from tests.builders import BusEnds, make_batch, take_mark, wait_unwanted


class Lending:
    """A worker's pools and its lender; `turn` has it answer who asks, and notice who has gone."""

    def __init__(self, directory: Path, *streams: str, chunks: int = 3, boot: int = 1) -> None:
        self.boot = boot
        self.path = pool_path(directory, "ingest.1")
        self.pools = {name: Pool(name, chunks * CHUNK) for name in streams or ("messages",)}
        self.selector = selectors.DefaultSelector()
        self.lender = Lender(self.path, boot, self.pools, self._watch, self.selector.unregister)

    def _watch(self, sock: socket.socket, handle: Callable[[], object]) -> None:
        self.selector.register(sock, selectors.EVENT_READ, handle)

    @property
    def pool(self) -> Pool:
        """The pool of the first stream."""
        return next(iter(self.pools.values()))

    def turn(self) -> None:
        """Do what there is to do, until there is nothing."""
        while ready := self.selector.select(0):
            for key, _ in ready:
                if key.fileobj in self.selector.get_map():
                    key.data()

    def lend(self, payload: bytes) -> tuple[int, int, int] | None:
        """Lend a payload; return the loan's number, its chunk and the size, None when nothing can be lent."""
        loan = self.pool.lend()
        if loan is None:
            return None
        assert len(loan.memory) == CHUNK
        loan.memory[: len(payload)] = payload
        self.pool.lent(loan)
        return loan.number, loan.chunk, len(payload)

    def close(self) -> None:
        """End as a worker does, once."""
        if not self.pools:
            return
        self.lender.close()
        for pool in self.pools.values():
            pool.close()
        self.selector.close()
        self.pools.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class LendingWorker(Lending):
    """An ingest worker played by the test: a real feed of one stream, which lends what is large enough."""

    def __init__(self, bus: BusEnds, clock: "PoolClock") -> None:
        self.publisher = bus.publisher()
        super().__init__(bus.directory, boot=self.publisher.boot)
        self._clock = clock
        self.account: Counter[str] = Counter()
        self.feed = StreamFeed("messages", self.publisher, self.account, self.pool)

    def greet(self) -> None:
        """Send a mark when somebody has subscribed, then let the time pass for which nothing is lent."""
        self.feed.mark(0)
        self._clock.pass_grace()

    def admit(self, *subscribers: Subscriber) -> None:
        """Let these subscribers meet a mark, and borrow from now on: by the next one they know that they may."""
        for _ in range(2):
            self.greet()
            for subscriber in subscribers:
                take_mark(subscriber)
            self.turn()
        wait_unwanted(self.publisher, inline_topic("messages"))

    def publish(self, payloads: Sequence[bytes], stride: int = 0) -> bool:
        """Publish a batch as a receiver would; return whether it was lent."""
        batch = make_batch(payloads, ["192.0.2.1", "2001:db8::1"])
        if stride:
            whole = b"".join(payload.ljust(stride, b"?") for payload in payloads)
            batch = DatagramBatch(batch.stream, 0, batch.rows, whole, stride)
        assert self.feed.receive(len(batch), len(batch.payload))
        loan, payload = self.feed.lend(len(batch.payload)), batch.payload
        if loan is not None:
            loan.memory[: len(payload)] = payload
            payload = loan.memory[: len(payload)]
        self.feed.publish(0, batch.rows, payload, loan, stride)
        return loan is not None


class PoolClock:
    """The pool's clock: it stands still unless the test moves it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(shared.bus.loans.lender, "time", SimpleNamespace(monotonic=lambda: self.now))

    def pass_grace(self) -> None:
        """Let the time pass for which nothing is lent."""
        self.now += GRACE_SECONDS
