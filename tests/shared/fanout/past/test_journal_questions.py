from collections import Counter
from types import SimpleNamespace
from typing import cast

import pytest

from shared.bus.bodies.journal_messages import JournalRead
from shared.bus.zmq_sockets import Publisher
from shared.fanout.past.journal_questions import ALL_PAYLOAD, ALL_ROWS, JournalQuestions, Pursued
from shared.fanout.past.pursuit import Pursuit


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
