"""A finding: the check, its level, the reason, and the cure."""

from collections.abc import Iterable
from typing import Final, Literal

import msgspec

Level = Literal["ok", "warning", "error"]
NAMES_SHOWN: Final = 5


class Finding(msgspec.Struct, frozen=True):
    """The result of one check: `name` is a stable word, `subject` the collector, stream or interface, if any."""

    name: str
    level: Level
    why: str
    cure: str = ""
    subject: str = ""


def ok(name: str, why: str, subject: str = "") -> Finding:
    """Return a finding that needs nothing."""
    return Finding(name, "ok", why, "", subject)


def warning(name: str, why: str, cure: str, subject: str = "") -> Finding:
    """Return a finding that datagrams may be lost, or that this could not be seen."""
    return Finding(name, "warning", why, cure, subject)


def error(name: str, why: str, cure: str, subject: str = "") -> Finding:
    """Return a finding that a collector gets nothing, or datagrams that are not for it."""
    return Finding(name, "error", why, cure, subject)


def unseen(name: str, what: str, subject: str = "") -> Finding:
    """Return a finding about a fact that this process can't see."""
    return warning(
        name, f"{what} can't be seen from here", "run it as root, in the host's own network namespace", subject
    )


def some(names: Iterable[str]) -> str:
    """Return the first few names, and the number of others.

    >>> some(["a", "b"]), some("abcdefg")
    ('a, b', 'a, b, c, d, e and 2 more')
    """
    every = list(names)
    more = len(every) - NAMES_SHOWN
    return ", ".join(every[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
