"""Whole numbers as people write and say them. No I/O."""

from typing import Final

MAX_DIGITS: Final = 20
"""More digits than any accepted number has; leading zeros count too."""

UNITS: Final = (("d", 86_400), ("h", 3_600), ("min", 60))


def parse_whole(text: str, smallest: int, largest: int) -> int:
    """Return the number. ValueError when it is none, or out of range.

    >>> parse_whole("064", 1, 255)
    64
    """
    if not (text.isascii() and text.isdigit() and len(text) <= MAX_DIGITS and smallest <= int(text) <= largest):
        raise ValueError(f"expected a whole number from {smallest} to {largest}, not {text!r}")
    return int(text)


def counted(count: int, noun: str) -> str:
    """Return a number of things, as people say it.

    >>> counted(1, "client"), counted(2, "client")
    ('1 client', '2 clients')
    """
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def lasting(seconds: float) -> str:
    """Return a time in the largest unit of which there are at least two.

    >>> lasting(5), lasting(150), lasting(7_200), lasting(200_000)
    ('5 s', '2 min', '2 h', '2 d')
    """
    unit, size = next(((unit, size) for unit, size in UNITS if seconds >= 2 * size), ("s", 1))
    return f"{int(seconds // size)} {unit}"
