import time
from pathlib import Path

import msgspec
import pytest

from shared.bus.messages import Envelope, Status
from shared.bus.pieces import PIECE_SIZE
from shared.bus.status import INTERVAL_SECONDS, Reporter, Reports
from shared.ledger.accounts import Accounts
from tests.builders import BusEnds, make_envelope, take, wait_wanted
from tests.stack import Stack


def piece(number: int, pieces: int, report: int = 1, **account: int) -> tuple[Envelope, Status]:
    """A piece of a report of one worker."""
    envelope = make_envelope(sender="ingest.1", kind="status")
    return envelope, Status("ingest.1", 42, 7, report, number, pieces, {f"stream/{number}": account})


def test_report_in_pieces_comes_together() -> None:
    """A report is there when its last piece has come, with the accounts of all."""
    reports = Reports()
    assert reports.add(*piece(0, 3, received=1)) is None
    assert reports.add(*piece(1, 3, received=2)) is None
    assert reports.latest == {}
    report = reports.add(*piece(2, 3, received=3))
    assert report is not None
    assert report.accounts == {f"stream/{number}": {"received": number + 1} for number in range(3)}
    assert (report.service, report.pid, report.started_ns, report.number) == ("ingest.1", 42, 7, 1)
    assert reports.latest == {("ingest.1", 1): report}


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_lost_piece_makes_no_report(lost: int) -> None:
    """A report of which any piece was lost is never shown; the one before it stays, and the next one is whole."""
    reports = Reports()
    before = reports.add(*piece(0, 1, report=1))
    for number in range(3):
        if number != lost:
            assert reports.add(*piece(number, 3, report=2)) is None
    assert reports.latest["ingest.1", 1] is before
    taken = [reports.add(*piece(number, 3, report=3)) for number in range(3)]
    assert taken[2] is not None
    assert taken[2].number == 3
    assert len(taken[2].accounts) == 3


def test_rest_of_one_report_does_not_complete_another() -> None:
    """Pieces of two reports are not mixed."""
    reports = Reports()
    assert reports.add(*piece(0, 2, report=1)) is None
    assert reports.add(*piece(1, 2, report=2)) is None
    assert reports.latest == {}


def test_restarted_service_is_another_one() -> None:
    """Reports are kept by name and boot id: a restart does not take its predecessor's last accounts away.

    Nothing else is kept of it.
    """
    reports = Reports()
    for boot in (1, 2):
        _, status = piece(0, 1)
        reports.add(make_envelope(boot=boot, kind="status"), status)
    assert set(reports.latest) == {("ingest.1", 1), ("ingest.1", 2)}
    assert not reports._assemblers


def test_many_accounts_are_reported_in_pieces_under_the_limit(stack: Stack) -> None:
    """Accounts too many for a message come in pieces, each within the piece size, and are whole at the reader."""
    stack.start("broker")
    accounts: Accounts = {
        f"collector/{'é' * 100}{number}": {f"counter_{each}": number for each in range(10)} for number in range(2000)
    }
    with BusEnds(stack.bus) as bus:
        publisher, subscriber = bus.publisher(), bus.subscriber("status/ingest.1/")
        reporter, reports = Reporter(publisher), Reports()
        wait_wanted(publisher, "status/ingest.1/")
        reporter.report(lambda: accounts)
        sizes = []
        while not reports.latest:
            message = take(subscriber)
            assert isinstance(message.body, Status)
            reports.add(message.envelope, message.body)
            sizes.append(len(msgspec.msgpack.encode(message.body.accounts)))
        assert len(sizes) > 1
        assert max(sizes) <= PIECE_SIZE
        (report,) = reports.latest.values()
        own = report.accounts.pop("ingest")
        assert report.accounts == accounts
        assert own["discrepancies"] == 0
        assert own["memory"] > own["memory_ceiling"] == 0  # there is none, but it is told all the same


def test_discrepancy_is_counted_and_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accounts are checked each second, whoever listens; what is broken counts, and is said, when that has changed."""
    clock = [1000.0]
    monkeypatch.setattr("shared.bus.status.time.monotonic", lambda: clock[0])
    account = {"received": 5, "published": 3}
    with BusEnds(tmp_path) as bus:
        reporter = Reporter(bus.publisher("ingest.1"))

        def said() -> int:
            reporter.report(lambda: {"stream/x": account})
            text = capsys.readouterr().out
            assert text.count("stream/x: received is") == text.count("please report it with `fanwire ledger --json`")
            return text.count("stream/x: received is")

        assert said() == 1
        account["published"] = 4  # within the second nobody looks
        assert said() == 0
        clock[0] += INTERVAL_SECONDS
        assert said() == 1
        clock[0] += INTERVAL_SECONDS
        account |= {"received": 9, "published": 8}
        assert said() == 0
        clock[0] += INTERVAL_SECONDS
        account["published"] = 9
        assert said() == 0
        assert reporter.found == 2


def test_reporter_is_asked_by_a_subscription_that_takes_its_topic(tmp_path: Path) -> None:
    """A subscription to all status, or to this service's own, asks for a report; one to another service does not."""
    with BusEnds(tmp_path) as bus:
        reporter = Reporter(bus.publisher("ingest.1"))
        assert reporter.asked_for(["registry/", "status/"])
        assert reporter.asked_for(["status/ingest.1/"])
        assert reporter.asked_for([""])
        assert not reporter.asked_for(["status/ingest.10/", "status/forwarder.1/", "registry/"])


def test_next_report_is_due_an_interval_later(tmp_path: Path) -> None:
    """The next report is due after the interval, whether or not anybody listens."""
    with BusEnds(tmp_path) as bus:
        reporter = Reporter(bus.publisher("ingest.1"))
        assert reporter.due_at <= time.monotonic()
        reporter.report(dict)
        assert time.monotonic() < reporter.due_at <= time.monotonic() + INTERVAL_SECONDS
