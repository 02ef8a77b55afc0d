"""Answers of the application by itself, to requests as a server hands them on."""

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from itertools import repeat
from types import SimpleNamespace
from typing import Any, cast
from urllib.parse import urlencode

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from prometheus_client.core import Metric

from services.console import app
from services.console.admin import Admin
from services.console.app import MAX_TOP, Console
from services.console.bus_watch import PICTURE_SECONDS, Watch
from services.console.guard import ADMIN, CHANGES, Holder
from services.console.metrics import stack_metrics
from services.console.one_datagram import Sampler
from shared.monitoring.picture import Picture, Verdict
from tests.services.console.told import busy

PICTURE = busy()
WATCH = cast(Watch, SimpleNamespace(current=lambda: PICTURE))
APPLICATION = Console(WATCH, cast(Sampler, None), cast(Admin, None), "1").application()


def ask(path: str, query: str = "", method: str = "GET", body: list[dict[str, Any]] | None = None) -> tuple[int, str]:
    """The status and the text of an answer; `body` are the messages by which that of the request comes."""
    said: list[Any] = []
    coming = iter(body or [{"type": "http.request", "body": b""}])

    async def receive() -> dict[str, Any]:
        return next(coming)

    async def send(message: Any) -> None:
        said.append(message)

    scope = {"type": "http", "method": method, "path": path, "query_string": query.encode(), "headers": []}
    asyncio.run(APPLICATION({**scope, ADMIN: Holder("boss", "secret")}, receive, send))
    return said[0]["status"], b"".join(each.get("body", b"") for each in said).decode()


@given(st.text() | st.from_regex(r"0{0,9}[0-9]{1,5}", fullmatch=True))
@example("000000001" + "0" * 4400)
@example("²")
def test_any_number_of_exporters_may_be_asked_for(top: str) -> None:
    """A number in its range is answered; any other text is refused with what was expected."""
    fits = top.isascii() and top.isdigit() and len(top) <= 4 and 1 <= int(top) <= MAX_TOP
    status, text = ask("/metrics/exporters", urlencode({"top": top}))
    assert status == (200 if fits else 400)
    assert fits or text == "top: expected a number from 1 to 1000"


def test_scrapes_of_one_picture_share_its_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Metrics are made once for each picture and format, however often they are asked for."""
    made: list[Picture] = []

    def note(picture: Picture, clock: float, version: str) -> Iterator[Metric]:
        made.append(picture)
        yield from stack_metrics(picture, clock, version)

    pictures = repeat(PICTURE)
    monkeypatch.setattr(WATCH, "current", lambda: next(pictures))
    monkeypatch.setattr(WATCH, "clock_offset", 0.0, raising=False)
    monkeypatch.setattr(app, "stack_metrics", note)
    first = ask("/metrics")
    assert first[0] == 200
    assert ask("/metrics") == first
    assert made == [PICTURE]
    pictures = repeat(later := busy())
    assert ask("/metrics")[0] == 200
    assert made == [PICTURE, later]


@pytest.mark.parametrize(("is_new", "answer"), [(True, (200, "copies flow\n")), (False, (503, "not heard\n"))])
def test_a_console_that_was_just_started_waits_until_it_has_heard(
    monkeypatch: pytest.MonkeyPatch, is_new: bool, answer: tuple[int, str]
) -> None:
    """It answers once everybody was heard; later it says at once why copies do not flow, and looks no more often."""
    deaf = replace(PICTURE, verdict=Verdict("error", ("not heard",)))
    pictures, ages = iter([deaf, deaf, *repeat(PICTURE, 9)]), set()

    def current(seconds: float) -> Picture:
        ages.add(seconds)
        return next(pictures)

    monkeypatch.setattr(WATCH, "current", current)
    monkeypatch.setattr(WATCH, "is_new", is_new, raising=False)
    monkeypatch.setattr(app, "LOOK_SECONDS", 0.0)
    assert ask("/readyz") == answer
    assert ages == {0.0 if is_new else PICTURE_SECONDS}


@pytest.mark.parametrize("change", ["remove", "withhold", "release", "probe"])
def test_a_request_whose_sender_has_gone_changes_nothing(change: str) -> None:
    """A body that does not come whole is no error of the console's, whatever was asked for."""
    gone: list[dict[str, Any]] = [
        {"type": "http.request", "body": b"{", "more_body": True},
        {"type": "http.disconnect"},
    ]
    assert ask(CHANGES + change, method="POST", body=gone)[0] == 400
