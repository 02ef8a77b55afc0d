"""Decisions about the past that a collector asks for by `since`: from when on, of which streams, and whose. No I/O."""

from datetime import datetime
from typing import Final, NamedTuple

from services.gateway.protocol.requests import EXPECTED, Register, RequestError
from services.gateway.registry.entry import Entry
from services.gateway.registry.reached_places import Pasts
from shared.client import ALL_STREAMS, Resume

LEFT: Final = "left"


class PastGrant(NamedTuple):
    """The past that a collector gets; `note` says what it does not get.

    With `catch_up` it gets later what it misses from now on.
    """

    resume: Resume | None = None
    catch_up: bool = False
    note: str = ""


def grant_past(asked: Register, present: Entry | None, holder: str, pasts: Pasts) -> PastGrant:
    """Return the past that a request gets; `present` is the entry that it replaces. `RequestError`: it gets none."""
    if asked.since is None:
        return PastGrant()
    streams = pasts.journaled_of(asked.streams)
    if not streams:
        has_none = "none of the streams has a journal" if asked.streams else "a client without streams has no past"
        raise RequestError("bad_request", f"since: {has_none}; leave it out, or set journal = true in [[stream]]")
    lacking = sorted(set(asked.streams) - {ALL_STREAMS, *streams})
    note = f"there is no journal of {', '.join(lacking)}: only live copies of it" if lacking else ""
    if asked.since != LEFT:
        since_ns = int(parse_since(asked.since, pasts.unix_time()) * 1e9)
        return PastGrant(Resume(since_ns, streams=() if ALL_STREAMS in asked.streams else streams), note=note)
    resume = pasts.left(asked.name, asked.streams, holder, present)
    if resume is None:
        unknown = f"it is not known where {asked.name!r} has left: live copies only, from now on"
        return PastGrant(None, catch_up=True, note=note or unknown)
    return PastGrant(resume, catch_up=True, note=note)


def parse_since(since: float | str, now: float) -> float:
    """Return the time, in seconds since 1970, that `since` means at the time `now`.

    >>> parse_since(60, 1_000_000.0), parse_since("1970-01-02T00:00:00Z", 1_000_000.0)
    (999940.0, 86400.0)
    """
    if not isinstance(since, str):
        return max(0.0, now - since)
    try:
        at = datetime.fromisoformat(since).timestamp()
    except (ValueError, OverflowError):  # it is no time, or none that the C library can tell in this time zone
        at = -1.0
    if at < 0:
        raise RequestError("bad_request", f"since: expected {EXPECTED['since']}")
    if at > now:
        raise RequestError("bad_request", "since: that time is still to come; expected one that has passed")
    return at
