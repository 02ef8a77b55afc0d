from typing import Any

import pytest

from shared.bus import loss_log
from shared.bus.loss_log import QUIET_SECONDS, LossLog
from shared.ledger.accounts import Accounts


def said(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The list that its lines come to."""
    lines: list[dict[str, Any]] = []

    class Log:
        def warning(self, event: str, **fields: Any) -> None:
            lines.append({"event": event, **fields})

    monkeypatch.setattr(loss_log, "log", Log())
    return lines


def siem(**counters: int) -> Accounts:
    """The account of a collector."""
    return {"collector/siem": counters}


def test_a_loss_is_logged_when_it_begins_and_when_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss has one line at its beginning and one at its end, with what came between, however often it grows."""
    lines = said(monkeypatch)
    losses = LossLog("forwarder.1")
    losses.note(siem(refusals=4), 0.0)  # from an earlier start
    losses.note(siem(refusals=4), 1.0)
    assert lines == []
    for number in range(10):
        losses.note(siem(refusals=6 + number), 2.0 + number)
    losses.note(siem(refusals=15), 11.0 + QUIET_SECONDS - 0.1)
    assert lines == [
        {"event": "loss began", "place": "network", "of": "siem", "cause": "refused", "lost": 2, "total": 6}
    ]
    losses.note(siem(refusals=15), 11.0 + QUIET_SECONDS)
    assert lines[1:] == [
        {
            "event": "loss ended",
            "place": "network",
            "of": "siem",
            "cause": "refused",
            "lost": 11,
            "total": 15,
            "seconds": 9.0,
        }
    ]


def test_an_account_that_begins_anew_or_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A collector that signs up anew counts from 0; one that leaves ends its loss, with no number."""
    lines = said(monkeypatch)
    losses = LossLog("forwarder.1")
    losses.note({}, 0.0)
    losses.note(siem(dropped_refused=9), 1.0)
    losses.note(siem(dropped_refused=9), 1.0 + QUIET_SECONDS)
    losses.note(siem(dropped_refused=3), 8.0)
    losses.note({}, 9.0)
    assert [(line["event"], line.get("lost")) for line in lines] == [
        ("loss began", 9),
        ("loss ended", 9),
        ("loss began", 3),
        ("loss ended", None),
    ]


def test_starts_of_a_worker_and_gaps_of_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each start of a worker that loses has its line; a gap that was the kernel's is no loss upstream anew."""
    lines = said(monkeypatch)
    senders, worker = LossLog("forwarder.1"), LossLog("ingest.1")
    for number, lost in enumerate((0, 4)):
        senders.note({"origin/ingest.1/1/syslog": {"missed": lost}, "origin/ingest.1/2/syslog": {"missed": 9}}, number)
    for number, (missed, dropped) in enumerate(((500, 0), (500, 10), (510, 10))):
        worker.note({"stream/flows": {"exporter_missed": missed, "kernel_dropped": dropped}}, number)
    assert [(line["place"], line["lost"], line["total"]) for line in lines] == [("bus", 4, 13), ("kernel", 10, 10)]
