"""Whole numbers as people write them. No I/O."""

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
