from collections import Counter
from types import SimpleNamespace
from typing import cast

import pytest

from shared.bus.bodies.journal_messages import JournalPortion, JournalRead, Replayed
from shared.bus.messages import Message, Status
from shared.bus.zmq_sockets import Publisher
from shared.fanout.catch_up.journal_questions import (
    ALL_PAYLOAD,
    ALL_ROWS,
    ANSWER_SECONDS,
    MAX_ACCOUNTS,
    JournalQuestions,
    JournalReports,
    Pursued,
)
from shared.fanout.catch_up.pursuit import Pursuit
from tests.builders import make_batch, make_envelope


@pytest.mark.parametrize(("count", "rows", "payload"), [(1, 1024, 1 << 18), (100, 1024, 1 << 18), (4096, 64, 1 << 14)])
def test_however_many_catch_up_what_waits_for_them_is_bounded(count: int, rows: int, payload: int) -> None:
    """Each asks for a portion that is the smaller the more there are: together they take no more memory."""
    asked: list[JournalRead] = []
    played = SimpleNamespace(sender="forwarder.1", boot=1, publish=lambda _, request: asked.append(request) or True)  # type: ignore[func-returns-value]
    questions = JournalQuestions(cast(Publisher, played), lambda: 0.0)
    for number in range(count):
        questions.ask(Pursued(str(number), 1, Pursuit("flows", 1, Counter())), 1.0, count)
    assert {(each.rows, each.payload) for each in asked} == {(rows, payload)}
    assert len(asked) == count
    assert sum(each.rows for each in asked) <= ALL_ROWS
    assert sum(each.payload for each in asked) <= ALL_PAYLOAD


def test_an_answer_comes_to_the_one_that_has_asked_and_waits_for_it() -> None:
    """Of thousands that have asked nobody else is looked at; an answer to a question that was given up is dropped."""
    asked: list[JournalRead] = []
    played = SimpleNamespace(sender="forwarder.1", boot=1, publish=lambda _, request: asked.append(request) or True)  # type: ignore[func-returns-value]
    questions = JournalQuestions(cast(Publisher, played), lambda: 1.0)
    first, second, gone = (Pursued(name, 1, Pursuit("flows", 1, Counter())) for name in ("first", "second", "gone"))
    for each in (first, second, gone):
        questions.ask(each, 1.0)
    del each, gone
    questions.ask(first, 1.0 + ANSWER_SECONDS)
    for request in asked:
        batch = make_batch([b"%d" % request.id], stream="flows")
        for body, came in (
            (Replayed(request.id, "flows", 5, "ingest.1", 1, 0, 0), batch),
            (JournalPortion(request.id, 1, [], None, at_end=True), None),
        ):
            assert questions.handle(Message("else/", make_envelope(), body, came))
    assert [request.id for request in asked] == [1, 2, 3, 4]
    assert [[bytes(each.batch.payload) for each in of.pursuit._queue] for of in (first, second)] == [[b"4"], [b"2"]]
    assert not questions._asked


def test_however_often_workers_start_what_is_known_of_losses_is_bounded() -> None:
    """Of many starts, of which the journal tells in turn, the latest are known, and their losses count."""
    reports, seen = JournalReports(), set()
    for start in range(MAX_ACCOUNTS + 2):
        accounts = {f"origin/ingest.1/{start:x}/flows": {"missed": 1, "reached": 5}}
        told = reports.read(make_envelope(sender="journal.1"), Status("journal.1", 1, 1, 1, 0, 1, accounts))
        lost, reached = told("flows")
        seen.add(lost)
        assert reached == {("ingest.1", start): 5}
    assert len(seen) == len(reports._lost["flows"]) == MAX_ACCOUNTS
