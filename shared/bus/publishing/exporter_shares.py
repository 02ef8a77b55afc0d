"""Shares of the exporters in a stream, counted while anybody asks: of every datagram, or of a sample at high rates."""

import random
import time
from collections import Counter
from collections.abc import Callable
from typing import Final

import numpy as np

from shared.bus.bodies.exporters_message import MAX_TOLD, Exporters
from shared.bus.messages import exporters_topic
from shared.bus.zmq_sockets import Publisher
from shared.datagrams.batch import ROW, Rows

EXAMINED: Final = 8192
"""Rows looked at in a second, about: at higher rates every n-th is. To sort these takes a millisecond."""


class ExporterShares:
    """Notes the rows of one stream, and makes a message of them each second."""

    def __init__(self, stream: str) -> None:
        self._stream = stream
        self._factors = np.array([random.getrandbits(64) | 1 for _ in range(2)], np.uint64)
        self._every = 1
        self._begin()

    def _begin(self) -> None:
        self._noted: list[bytes] = []
        self._rows = self._next = 0
        self._began = time.monotonic()

    def note(self, rows: Rows | bytes) -> None:
        """Note rows, dtype `ROW`, that were published. An array is copied, since it is the arena's."""
        if self._every == 1:
            self._noted.append(rows if isinstance(rows, bytes) else rows.tobytes())
            self._rows += len(self._noted[-1]) // ROW.itemsize
            return
        found = np.frombuffer(rows, ROW) if isinstance(rows, bytes) else rows
        self._noted.append(found[self._next :: self._every].tobytes())
        self._rows += len(found)
        self._next = (self._next - len(found)) % self._every

    def take(self, missed: Counter[bytes] | None = None) -> Exporters:
        """Return the shares since the last call, and begin anew; with what was `missed` of each address, if known."""
        noted = np.frombuffer(b"".join(self._noted), ROW)
        seconds = max(0.001, time.monotonic() - self._began)
        # By a hash, which is sorted faster. A sender can't aim at a hash that two exporters share.
        keys = np.ascontiguousarray(noted["address"]).view(np.uint64) @ self._factors
        _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
        counts = np.bincount(inverse, minlength=len(first))
        sizes = np.bincount(inverse, noted["length"], minlength=len(first)).astype(np.int64)
        most = np.argsort(-counts, kind="stable")[:MAX_TOLD]
        told = [(noted["address"][first[at]].tobytes(), int(counts[at]), int(sizes[at])) for at in most.tolist()]
        message = Exporters(
            self._stream,
            seconds,
            self._rows,
            self._every,
            len(first),
            told,
            None if missed is None else missed.most_common(MAX_TOLD),
        )
        self._every = max(1, int(self._rows / seconds) // EXAMINED)
        self._begin()
        return message


class SharesPublisher:
    """Publishes the shares of a stream's exporters each second, and counts them only while somebody subscribes."""

    def __init__(self, stream: str, publisher: Publisher) -> None:
        self._stream = stream
        self._publisher = publisher
        self._topic = exporters_topic(publisher.sender)
        self._shares: ExporterShares | None = None

    def note(self, rows: Rows | bytes) -> None:
        """Note rows that were published, as `ExporterShares` does."""
        if self._shares:
            self._shares.note(rows)

    def publish(self, missed: Callable[[], Counter[bytes]] | None = None) -> None:
        """Publish the shares since the last call. Due every second."""
        if not self._publisher.wanted(self._topic):
            self._shares = None
        elif self._shares is None:
            self._shares = ExporterShares(self._stream)
        else:
            self._publisher.publish(self._topic, self._shares.take(missed and missed()))
