"""Whole numbers as people write and say them. No I/O."""

from typing import Final

MAX_DIGITS: Final = 20
"""More digits than any accepted number has; leading zeros count too."""


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
