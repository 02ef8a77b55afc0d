"""Lists longer than a bus message: cut into pieces by the publisher, put together by the subscriber."""

import time
from collections.abc import Callable, Hashable, Iterable
from typing import Final, Generic, Protocol, TypeVar

PIECE_SIZE: Final = 256 * 1024
"""Bytes of body at which a list is cut: far enough from `MAX_MESSAGE` that no item can reach it."""

T = TypeVar("T")


class Piece(Protocol):
    """A body that is one of several of a list."""

    @property
    def piece(self) -> int:
        """The number of this piece, from 0."""

    @property
    def pieces(self) -> int:
        """The number of pieces."""


P = TypeVar("P", bound=Piece)


def cut(items: Iterable[T], size_of: Callable[[T], int]) -> list[list[T]]:
    """Return the items in pieces, at least one, each of at most `PIECE_SIZE` bytes or of a single item."""
    pieces: list[list[T]] = [[]]
    size = 0
    for item in items:
        cost = size_of(item)
        if pieces[-1] and size + cost > PIECE_SIZE:
            pieces.append([])
            size = 0
        pieces[-1].append(item)
        size += cost
    return pieces


class Assembler(Generic[P]):
    """Puts a list together; it discards a list that lacks a piece, or one with a piece out of order."""

    def __init__(self) -> None:
        self.began_at = 0.0
        """Time at which the first piece came, on the monotonic clock."""
        self._key: Hashable = None
        self._pieces: list[P] = []

    def add(self, key: Hashable, body: P) -> list[P] | None:
        """Add a piece of the list that `key` names; return all of its pieces when this was the last."""
        if body.piece == 0:
            self._key, self._pieces, self.began_at = key, [], time.monotonic()
        if key != self._key or body.piece != len(self._pieces):
            return None
        self._pieces.append(body)
        if len(self._pieces) < body.pieces:
            return None
        whole, self._pieces = self._pieces, []
        return whole

    def clear(self) -> None:
        """Drop the pieces received so far; later pieces of the same list complete nothing."""
        self._key, self._pieces = None, []
