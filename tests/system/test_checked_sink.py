import socket
from contextlib import closing
from pathlib import Path

import numpy as np

from tests.benchmarks.site import Sink
from tests.stack import wait_until
from tests.system.checked_sink import MIXED, CheckedSink


def test_what_is_not_right_is_found(lab: None, tmp_path: Path) -> None:
    """Other bytes, another source, a number that came before and a wrong order are counted, each as what it is."""
    payloads = MIXED.payloads()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as into, socket.socket(type=socket.SOCK_DGRAM) as sender:
        into.bind(("127.0.0.1", 0))
        into.setblocking(False)
        with closing(CheckedSink(Sink(into), tmp_path, 0, original=True)) as sink:
            wrong = payloads[1][:5] + b"!" + payloads[1][6:]
            by_two_workers = (payloads[number] for number in (1200, 600, 601, 1201, 602))
            for payload in (payloads[0], wrong, payloads[2], payloads[2], *by_two_workers):
                sender.sendto(payload, into.getsockname())
            wait_until(lambda: sink.arrived == 9, "all have come")
            assert np.array_equal(sink.counters[1:5], [1, 9, 1, 0])  # none came from an exporter's address
            sender.sendto(payloads[600 + 1], into.getsockname())
            wait_until(lambda: sink.arrived == 10, "the last one has come")
            assert np.array_equal(sink.counters[1:5], [1, 10, 2, 1])
