"""A collector of the soak in a process of its own: each datagram's bytes, source and order are compared as it comes."""

import os
import random
import select
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from shared.datagrams.mmsg import ReceiveArena
from tests.benchmarks.workloads import MARK_SIZE, SYSLOG, Workload, exporter_address, read_mark
from tests.stack import CHECKOUT, start, wait_until

if TYPE_CHECKING:  # what it imports is not for the sink's process
    from tests.benchmarks.site import Sink

RECEIVED, WRONG_BYTES, WRONG_SOURCE, TWICE, OUT_OF_ORDER, READY = range(6)
MOST: Final = 1 << 26
"""Datagrams of one run; what notes them costs a byte for each that has come."""


def mixed_size(draw: random.Random) -> int:
    """Mostly short, some of a full frame, some longer than most networks carry."""
    kind = draw.random()
    if kind < 0.6:
        return draw.randint(60, 400)
    return 1464 if kind < 0.92 else draw.randint(1465, 8000)


MIXED: Final = Workload("mixed", 20_000, 200, 3, mixed_size, SYSLOG, mtu=9000)


class CheckedSink:
    """A sink whose process compares what comes; datagrams are numbered from 0, and never twice the same."""

    def __init__(self, sink: "Sink", directory: Path, number: int, *, original: bool) -> None:
        path = directory / f"sink.{number}"
        self._sink = sink
        self.counters = np.memmap(path, np.int64, "w+", shape=(6,))
        command = [sys.executable, "-m", "tests.system.checked_sink", str(path), str(int(original))]
        environment = os.environ | {"PYTHONPATH": str(CHECKOUT)}
        self._process = start(command, (sink.socket.fileno(), 1, 2), environment, CHECKOUT)
        wait_until(lambda: self.counters[READY], "the sink is ready")

    @property
    def idle(self) -> bool:
        """Return whether all that has come is in the counters."""
        readable, _, _ = select.select([self._sink.socket], [], [], 0)  # first: the process says that it is not idle,
        return not readable and bool(self.counters[READY])  # and then reads

    @property
    def arrived(self) -> int:
        """Datagrams that came: read, or dropped where the socket was full."""
        return int(self.counters[RECEIVED]) + self._sink.dropped

    def assert_right(self) -> None:
        """All were as sent, from where they should be, in their exporter's order, and none came twice.

        An exporter that was given to another worker has two orders meanwhile, that of each.
        """
        assert self.counters[WRONG_BYTES:READY].tolist() == [0, 0, 0, 0]

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()


def check(path: Path, workload: Workload, *, original: bool) -> None:
    """Receive for ever by standard input, and count."""
    counters = np.memmap(path, np.int64, "r+", shape=(6,))
    payloads = [payload[: -MARK_SIZE + 4] for payload in workload.payloads()]
    addresses = [exporter_address(number).packed for number in range(workload.exporters)]
    last, behind = [-1] * workload.exporters, [-1] * workload.exporters
    seen = bytearray(MOST)
    arena = ReceiveArena()
    while True:
        counters[READY] = 1
        select.select([0], [], [])
        counters[READY] = 0
        count = arena.receive(0)
        sources = arena.names.view(np.uint8).reshape(len(arena.names), -1)[:count, 4:8].tobytes()
        for index in range(count):
            payload = bytes(arena.payload(index, index + 1))
            exporter, number = read_mark(payload)
            counters[WRONG_BYTES] += payload[: -MARK_SIZE + 4] != payloads[number % workload.count]
            if original:
                counters[WRONG_SOURCE] += sources[4 * index : 4 * index + 4] != addresses[exporter]
            counters[TWICE] += seen[number]
            seen[number] = 1
            if number < last[exporter]:
                counters[OUT_OF_ORDER] += number < behind[exporter]
                behind[exporter] = number
            last[exporter] = max(number, last[exporter])
        arena.restore(count)
        counters[RECEIVED] += count


if __name__ == "__main__":
    check(Path(sys.argv[1]), MIXED, original=bool(int(sys.argv[2])))
