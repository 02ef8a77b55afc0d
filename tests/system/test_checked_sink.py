import socket
from contextlib import closing
from pathlib import Path

import numpy as np

from tests.benchmarks.site import Sink
from tests.stack import wait_until
from tests.system.checked_sink import MIXED, CheckedSink


def test_what_is_not_right_is_found(lab: None, tmp_path: Path) -> None:
    """Other bytes, another source and a number that came before are counted, each as what it is."""
    payloads = MIXED.payloads()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as into, socket.socket(type=socket.SOCK_DGRAM) as sender:
        into.bind(("127.0.0.1", 0))
        into.setblocking(False)
        with closing(CheckedSink(Sink(into), tmp_path, 0, original=True)) as sink:
            for payload in (payloads[0], payloads[1][:5] + b"!" + payloads[1][6:], payloads[2], payloads[2]):
                sender.sendto(payload, into.getsockname())
            wait_until(lambda: sink.arrived == 4, "all have come")
            assert np.array_equal(sink.counters[1:4], [1, 4, 1])  # none came from an exporter's address
