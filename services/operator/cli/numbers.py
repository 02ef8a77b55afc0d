"""Whole numbers as people write them. No I/O."""

from typing import Final

MAX_DIGITS: Final = 20
"""More than any number has that is taken; leading zeros count too."""


def parse_whole(text: str, smallest: int, largest: int) -> int:
    """Return the number. ValueError when it is none, or not between both.

    >>> parse_whole("064", 1, 255)
    64
    """
    if not (text.isascii() and text.isdigit() and len(text) <= MAX_DIGITS and smallest <= int(text) <= largest):
        raise ValueError(f"expected a whole number from {smallest} to {largest}, not {text!r}")
    return int(text)
