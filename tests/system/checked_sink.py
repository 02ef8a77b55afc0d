"""A collector of the soak in a process of its own: each datagram's bytes, source and order are compared as it comes."""

import select
import subprocess
import sys
from pathlib import Path

import numpy as np

from shared.datagrams.mmsg import ReceiveArena
from tests.benchmarks.site import Sink, exporter_address
from tests.benchmarks.workloads import MARK_SIZE, Workload, read_mark
from tests.stack import CHECKOUT, wait_until

RECEIVED, WRONG_BYTES, WRONG_SOURCE, OUT_OF_ORDER, READY = range(5)


class CheckedSink:
    """A sink whose process compares what comes; datagrams are numbered from 0, and never twice the same."""

    def __init__(self, sink: Sink, directory: Path, number: int, *, original: bool) -> None:
        path = directory / f"sink.{number}"
        self._sink = sink
        self.counters = np.memmap(path, np.int64, "w+", shape=(5,))
        descriptor = sink.socket.fileno()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.system.checked_sink", str(descriptor), str(path), str(int(original))],
            cwd=CHECKOUT,
            pass_fds=(descriptor,),
        )
        wait_until(lambda: self.counters[READY], "the sink is ready")

    @property
    def arrived(self) -> int:
        """Datagrams that came: read, or dropped where the socket was full."""
        return int(self.counters[RECEIVED]) + self._sink.dropped

    def assert_right(self) -> None:
        """All were as sent, from where they should be, in their exporter's order, and none came twice."""
        assert self.counters[WRONG_BYTES:READY].tolist() == [0, 0, 0]

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()


def check(descriptor: int, path: Path, workload: Workload, *, original: bool) -> None:
    """Receive for ever, and count."""
    counters = np.memmap(path, np.int64, "r+", shape=(5,))
    payloads = [payload[: -MARK_SIZE + 4] for payload in workload.payloads()]
    addresses = [exporter_address(number).packed for number in range(workload.exporters)]
    last = [-1] * workload.exporters
    arena = ReceiveArena()
    counters[READY] = 1
    while True:
        select.select([descriptor], [], [])
        count = arena.receive(descriptor)
        sources = arena.names.view(np.uint8).reshape(len(arena.names), -1)[:count, 4:8].tobytes()
        for index in range(count):
            payload = bytes(arena.payload(index, index + 1))
            exporter, number = read_mark(payload)
            counters[WRONG_BYTES] += payload[: -MARK_SIZE + 4] != payloads[number % workload.count]
            if original:
                counters[WRONG_SOURCE] += sources[4 * index : 4 * index + 4] != addresses[exporter]
            counters[OUT_OF_ORDER] += number <= last[exporter]
            last[exporter] = number
        arena.restore(count)
        counters[RECEIVED] += count


if __name__ == "__main__":
    from tests.system.test_soak import MIXED

    check(int(sys.argv[1]), Path(sys.argv[2]), MIXED, original=bool(int(sys.argv[3])))
