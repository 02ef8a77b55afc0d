"""A finding: what was looked at, how it stands, why, and what cures it."""

from collections.abc import Iterable
from typing import Final, Literal

import msgspec

Level = Literal["ok", "warning", "error"]
NAMES_SHOWN: Final = 5


class Finding(msgspec.Struct, frozen=True):
    """`name` is a stable word; `subject` the collector, stream or interface that it is about, if any."""

    name: str
    level: Level
    why: str
    cure: str = ""
    subject: str = ""


def ok(name: str, why: str, subject: str = "") -> Finding:
    """Nothing to do."""
    return Finding(name, "ok", why, "", subject)


def warning(name: str, why: str, cure: str, subject: str = "") -> Finding:
    """Datagrams may be lost, or it could not be seen whether they are."""
    return Finding(name, "warning", why, cure, subject)


def error(name: str, why: str, cure: str, subject: str = "") -> Finding:
    """Somebody gets nothing, or what is not theirs."""
    return Finding(name, "error", why, cure, subject)


def unseen(name: str, what: str, subject: str = "") -> Finding:
    """A fact that this process can't have."""
    return warning(
        name, f"{what} can't be seen from here", "run it as root, in the host's own network namespace", subject
    )


def some(names: Iterable[str]) -> str:
    """The first few names, and how many more there are.

    >>> some(["a", "b"]), some("abcdefg")
    ('a, b', 'a, b, c, d, e and 2 more')
    """
    every = list(names)
    more = len(every) - NAMES_SHOWN
    return ", ".join(every[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
