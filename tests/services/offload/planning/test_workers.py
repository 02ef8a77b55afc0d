import tracemalloc

from services.offload.planning.workers import SILENT_SECONDS, STEADY_SECONDS, Workers
from shared.bus.messages import Status
from shared.ledger.accounts import Accounts
from tests.builders import make_envelope

NO_ACCOUNTS: Accounts = {}


class Reporting:
    """Workers that report, on a clock that the test moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self.workers = Workers(lambda: self.now)
        self._number = 0

    def report(self, name: str = "ingest.1", boot: int = 1, accounts: Accounts = NO_ACCOUNTS, **counters: int) -> bool:
        """Report; return whether the reason has changed."""
        self._number += 1
        status = Status(name, 1, 0, self._number, 0, 1, {**accounts, name.partition(".")[0]: counters})
        return self.workers.note(make_envelope(sender=name, boot=boot), status)


def test_kernel_copies_once_every_worker_reads_marks() -> None:
    """Before the first report, and while any worker reads none, the kernel must not copy."""
    reporting = Reporting()
    assert reporting.workers.reason() == "no ingest worker has reported that it reads marks"
    assert reporting.report(mark_sockets=2)
    assert reporting.workers.reason() == ""
    assert not reporting.report(mark_sockets=2)
    assert reporting.report("ingest.2")
    assert reporting.workers.reason() == "ingest.2 does not read marks: what the kernel has copied would be sent again"
    assert reporting.report("ingest.2", mark_sockets=2)
    assert reporting.report("ingest.2", mark_sockets=2, mark_blind=1)
    assert reporting.report("ingest.2", mark_sockets=2)
    assert reporting.report("ingest.2", mark_sockets=2, marks_unread=5)
    assert not reporting.report("ingest.2", mark_sockets=2, marks_unread=6)
    assert reporting.report("ingest.2", mark_sockets=2, marks_unread=6)
    assert reporting.workers.reason() == ""
    assert not reporting.report("forwarder.1", by_kernel_late=0)


def test_sender_that_does_not_ask_is_of_an_older_release() -> None:
    """While a forwarder, or a transmitter with raw sockets, would send again what was copied, there are no rules."""
    reporting = Reporting()
    reporting.report(mark_sockets=2)
    assert not reporting.report("transmitter.1")
    assert reporting.report("forwarder.1", revision=1)
    assert reporting.workers.reason() == "forwarder.1 does not ask what the kernel has copied: it would send that again"
    assert reporting.report("forwarder.1", revision=1, by_kernel_late=0)
    assert reporting.workers.reason() == ""
    assert reporting.report("transmitter.1", raw_sockets=24)
    reporting.now += SILENT_SECONDS + 1
    reporting.report(mark_sockets=2)
    assert reporting.workers.expire()
    assert reporting.workers.reason() == ""


def test_sender_that_is_started_anew_is_no_reason() -> None:
    """Its first report may come before its subscription; what went up without rules meanwhile would be lost."""
    reporting = Reporting()
    reporting.report(mark_sockets=2)
    for boot in (1, 2):
        assert not reporting.report("transmitter.1", boot=boot, raw_sockets=24, by_kernel_late=0)
        assert reporting.workers.reason() == ""


def test_worker_that_has_ended_is_forgotten_but_the_last_that_could_read() -> None:
    """While ingest is restarted the kernel goes on copying; a blind worker that has ended is no reason any more."""
    reporting = Reporting()
    reporting.report(mark_sockets=2)
    reporting.report("ingest.2")
    reporting.now += SILENT_SECONDS - 1
    reporting.report(mark_sockets=2)
    assert not reporting.workers.expire()
    reporting.now += 2
    assert reporting.workers.expire()
    assert reporting.workers.reason() == ""
    reporting.now += 100
    assert not reporting.workers.expire()
    assert reporting.workers.reason() == ""


def test_marks_read_are_those_of_each_worker_as_it_told_last() -> None:
    """The sum over workers, by stream, with what the kernel has dropped; a restart begins anew."""
    reporting = Reporting()
    for name, boot, count in (("ingest.1", 1, 5), ("ingest.2", 1, 7), ("ingest.1", 2, 1)):
        account = {"marks_read": count, "kernel_dropped": 1, "received": 10 * count}
        reporting.report(name, boot, accounts={"stream/syslog": account}, mark_sockets=2)
    assert reporting.workers.marks_read() == {"syslog": 10}
    assert reporting.workers.received() == {"syslog": 80}


def test_accounts_of_processes_that_have_ended_take_no_memory() -> None:
    """A sender that has been started often leaves nothing behind, however many collectors it has told of."""
    reporting = Reporting()
    reporting.report(mark_sockets=2)
    accounts = {f"collector/{number}": {"sent": 1000 + number} for number in range(1000)}
    tracemalloc.start()
    try:
        for boot in range(1, 10):
            reporting.report("forwarder.1", boot, accounts=accounts, by_kernel_late=0)
            if boot == 1:
                before, _ = tracemalloc.get_traced_memory()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 1000 * 8


def test_workers_that_report_steadily_have_neither_begun_nor_paused_of_late() -> None:
    """A restart and a pause of any worker begin a new time."""
    reporting = Reporting()
    reporting.now = 10.0
    reporting.report(mark_sockets=2)
    reporting.now += 1
    reporting.report(mark_sockets=2)
    assert reporting.workers.reporting == (10.0, 11.0)
    reporting.now += 1
    reporting.report(boot=2, mark_sockets=2)
    assert reporting.workers.reporting == (12.0, 12.0)
    reporting.now += STEADY_SECONDS + 1
    reporting.report(boot=2, mark_sockets=2)
    assert reporting.workers.reporting == (reporting.now, reporting.now)


def test_a_worker_that_pauses_leaves_it_open_what_it_has_read() -> None:
    """The reports of others say nothing of its marks; once it is given up they do, from then on."""
    reporting = Reporting()
    reporting.now = 10.0
    reporting.report("ingest.2", mark_sockets=2)
    for _ in range(int(SILENT_SECONDS)):
        reporting.report(mark_sockets=2)
        reporting.now += 1
        reporting.workers.expire()
    reporting.report(mark_sockets=2)
    assert reporting.workers.reporting == (10.0, 10.0)
    reporting.now += 1
    reporting.report(mark_sockets=2)
    reporting.workers.expire()
    assert reporting.workers.reporting == (14.0, 14.0)
