import time
from contextlib import suppress
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.operator.cli.times import parse_time

NOW = datetime(2026, 11, 28, 17, 30, 5, tzinfo=timezone(timedelta(hours=1)))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("now", "2026-11-28T17:30:05+01:00"),
        ("10m ago", "2026-11-28T17:20:05+01:00"),
        ("10 minutes ago", "2026-11-28T17:20:05+01:00"),
        ("1h 30min ago", "2026-11-28T16:00:05+01:00"),
        ("1h30m ago", "2026-11-28T16:00:05+01:00"),
        ("0.5s ago", "2026-11-28T17:30:04.500000+01:00"),
        ("2d ago", "2026-11-26T17:30:05+01:00"),
        ("1 Week  ago", "2026-11-21T17:30:05+01:00"),
        ("03:12", "2026-11-28T03:12:00+01:00"),
        ("3:12", "2026-11-28T03:12:00+01:00"),
        ("17:30:05", "2026-11-28T17:30:05+01:00"),
        ("17:30:06", "2026-11-27T17:30:06+01:00"),
        ("03:12:07.25", "2026-11-28T03:12:07.250000+01:00"),
        ("yesterday 03:12", "2026-11-27T03:12:00+01:00"),
        ("today 23:00", "2026-11-28T23:00:00+01:00"),
        ("yesterday", "2026-11-27T00:00:00+01:00"),
        ("2026-11-28", "2026-11-28T00:00:00+01:00"),
        ("2026-11-28 03:12", "2026-11-28T03:12:00+01:00"),
        ("2026-11-28T03:12Z", "2026-11-28T03:12:00+00:00"),
        ("20261128T031207.5+0530", "2026-11-28T03:12:07.500000+05:30"),
    ],
)
def test_times_as_people_write_them(text: str, expected: str) -> None:
    """Each form means what a person means by it; without a zone it is local."""
    assert parse_time(text, NOW).isoformat() == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ago",
        "10 ago",
        "m ago",
        "10x ago",
        "25:00",
        "3:12pm",
        "tomorrow 03:12",
        "2026-13-01",
        "9999999999d ago",
        "5",
    ],
)
def test_what_is_no_time_is_refused(text: str) -> None:
    """Anything else is a ValueError that shows the forms."""
    with pytest.raises(ValueError, match=r"is no time; expected one such as 10m ago, 03:12, yesterday"):
        parse_time(text, NOW)


@given(st.text(max_size=40))
def test_no_text_does_any_harm(text: str) -> None:
    """For any text the answer is a time with a zone, or a ValueError."""
    with suppress(ValueError):
        assert parse_time(text, NOW).tzinfo


def test_local_times_have_the_offset_of_their_day(monkeypatch: pytest.MonkeyPatch) -> None:
    """A date before the end of summer time has the offset of summer; a time of day is the last one that was shown."""
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    try:
        now = datetime(2026, 11, 28, 12, 0, tzinfo=UTC).astimezone()
        assert parse_time("2026-07-01 12:00", now).isoformat() == "2026-07-01T12:00:00+02:00"
        assert parse_time("12:00", now).isoformat() == "2026-11-28T12:00:00+01:00"
        for at, text, expected in (
            ("2026-10-25T02:50:00+01:00", "02:30", "2026-10-25T02:30:00+01:00"),  # shown twice
            ("2026-10-25T02:10:00+01:00", "02:30", "2026-10-25T02:30:00+02:00"),
            ("2026-10-25T12:00:00+01:00", "01:30", "2026-10-25T01:30:00+02:00"),
            ("2026-03-29T12:00:00+02:00", "02:30", "2026-03-28T02:30:00+01:00"),  # not shown that day
        ):
            assert parse_time(text, datetime.fromisoformat(at).astimezone()).isoformat() == expected
    finally:
        monkeypatch.undo()
        time.tzset()
