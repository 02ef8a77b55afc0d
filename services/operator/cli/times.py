"""Times as people write them: `10m ago`, `03:12`, `yesterday 03:12`, or as ISO 8601 has them. No I/O."""

import re
from datetime import date, datetime, time, timedelta
from typing import Final

UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
FORMS: Final = "10m ago, 03:12, yesterday 03:12, 2026-11-28 03:12, 2026-11-28T03:12:07.5Z, or now"
_SPAN: Final = re.compile(
    r"(\d{1,9}(?:\.\d{1,9})?) ?(s(?:ec(?:ond)?s?)?|m(?:in(?:ute)?s?)?|h(?:ours?)?|d(?:ays?)?|w(?:eeks?)?) ?", re.ASCII
)
_CLOCK: Final = re.compile(r"(?:(today|yesterday) )?(\d{1,2}:\d\d(?::\d\d(?:\.\d{1,6})?)?)", re.ASCII)
_DAYS: Final = {"today": 0, "yesterday": 1}


def parse_time(text: str, now: datetime) -> datetime:
    """Return the moment that a text means `now`, which has a time zone: that of times without one of their own.

    A time of day alone is the last one: of today, or of yesterday where it is still to come. ValueError when the text
    is none of `FORMS`.

    >>> from datetime import UTC
    >>> now = datetime(2026, 11, 28, 4, 0, tzinfo=UTC)
    >>> [str(parse_time(text, now))[:16] for text in ("1h30m ago", "03:12", "04:30", "2026-11-01")]
    ['2026-11-28 02:30', '2026-11-28 03:12', '2026-11-27 04:30', '2026-11-01 00:00']
    """
    words = " ".join(text.lower().split())
    try:
        if words == "now":
            return now
        if words.endswith("ago"):
            return now - _span(words.removesuffix("ago").rstrip())
        if found := _CLOCK.fullmatch(words):
            return _last(found[1], time.fromisoformat(found[2].zfill(len(found[2]) + (found[2][1] == ":"))), now)
        if words in _DAYS:
            return _at(now.date() - timedelta(days=_DAYS[words]), time(), now)
        moment = datetime.fromisoformat(text.strip())
        return moment if moment.tzinfo else _at(moment.date(), moment.time(), now)
    except (ValueError, OverflowError):
        raise ValueError(f"{text!r} is no time; expected one such as {FORMS}") from None


def _span(text: str) -> timedelta:
    """Return a length of time, such as 1h30m."""
    seconds, at = 0.0, 0
    while at < len(text):
        found = _SPAN.match(text, at)
        if found is None:
            break
        seconds += float(found[1]) * UNITS[found[2][0]]
        at = found.end()
    if at < len(text) or not text:
        raise ValueError
    return timedelta(seconds=seconds)


def _last(day: str | None, clock: time, now: datetime) -> datetime:
    """Return when a clock showed this: on that day, or else the last time."""
    if day is not None:
        return _at(now.date() - timedelta(days=_DAYS[day]), clock, now)
    # Where summer time ends a clock shows it twice, and where it begins perhaps not at all.
    days = [now.date() - timedelta(days=back) for back in range(3)]
    some = [_at(each, clock.replace(fold=fold), now) for each in days for fold in (0, 1)]
    return max(at for at in some if at <= now and at.time() == clock)


def _at(day: date, clock: time, now: datetime) -> datetime:
    """Return a local time; with the offset that holds then, where `now` has that of this host."""
    at = datetime.combine(day, clock)
    is_local = now.tzinfo == now.astimezone().tzinfo
    return at.astimezone() if is_local else at.replace(tzinfo=now.tzinfo)
