import doctest
import os
import time

import services.operator.commands.running.status
from services.operator.commands.running.status import _row, _started
from shared.bus.status import Report
from tests.services.operator.played import PlayedService, finish
from tests.stack import Stack

MEMORY = {"broker": {"memory": 31 << 20, "memory_ceiling": 768 << 20}}

JOURNALED = """[[stream]]
name = "messages"
listen = ["udp://127.0.0.1:6667"]
journal = true
"""


def report(pid: int, started: float, release: str = "1.2.3") -> Report:
    """Make a broker's report."""
    return Report("broker.1", 1, pid, int(started * 1e9), 1, 0.0, MEMORY, release)


def test_a_process_and_its_privilege() -> None:
    """A process of this host is shown with user and capabilities; of another nothing is claimed but what it reports."""
    own = report(os.getpid(), _started(os.getpid()))
    assert _row(own)[::3] == ("broker.1", "1.2.3", 31)
    assert "unknown" not in _row(own)
    assert _row(own)[-2:] == (31, 768)
    another = report(os.getpid(), time.time() - 9 * 86_400, release="")  # the number is another process's now
    assert _row(another) == ("broker.1", str(os.getpid()), "9 d", "unknown", "unknown", "unknown", 31, 768)
    assert doctest.testmod(services.operator.commands.running.status).failed == 0


def test_a_service_that_is_missing(stack: Stack) -> None:
    """A service that has to report and does not is named, those that settings ask for too; the command ends with 69."""
    stack.configure(JOURNALED)
    stack.start("broker")
    with PlayedService(stack.bus, "ingest.1") as ingest:
        status = stack.operator("status")
        while status.process.poll() is None:
            ingest.report({"ingest": {"memory": 1 << 20, "memory_ceiling": 2 << 20}})
            time.sleep(0.05)
        code, text = finish(status)
    rows = [line.split() for line in text.splitlines()]
    assert code == 69
    assert ["gateway", "does", "not", "report"] in rows
    assert ["forwarder", "does", "not", "report"] in rows
    assert ["journal", "does", "not", "report"] in rows
    assert not [row for row in rows if row[:1] in (["uplink"], ["offload"])]
    assert [row[0] for row in rows if len(row) > 7 and row[0] != "service"] == ["broker.1", "ingest.1"]
