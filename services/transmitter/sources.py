"""Rows of one source brought together, without changing their order. No I/O."""

from typing import Final

import numpy as np
import numpy.typing as npt

from shared.batch import Indices, Rows
from shared.routing import Hashes, mix
from shared.segments import Mask

MAX_LENGTH: Final = 0xFFFF
_SPREAD: Final = np.array(
    [0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93, 0xFF51AFD7ED558CCD], np.uint64
)
"""Odd numbers without pattern, one for each 32 bits of a row: their products spread sources over 64 bits."""


def by_source(rows: Rows) -> tuple[Indices | None, Mask]:
    """Return the order that brings rows of one source together, and which rows begin another source, in that order.

    The order is None where they are together already. Two sources of one hash may stand mixed: that only costs frames,
    since where one ends is seen by the address itself.
    """
    words = _words(rows)
    begins = np.ones(len(rows), np.bool_)
    begins[1:] = _differ(words[1:], words[:-1])
    heads = np.flatnonzero(begins)
    if len(heads) < 3:  # not even two stretches of one source with another in between
        return None, begins
    hashes = _hash(words[heads])
    ordered = np.sort(hashes)
    if (ordered[1:] != ordered[:-1]).all():
        return None, begins
    # Stretches are what is moved, as they are: there are often far fewer of them than rows.
    by_hash = np.argsort(hashes, kind="stable")
    sizes = np.diff(heads, append=len(rows))[by_hash]
    ends = np.cumsum(sizes)
    heads, starts = heads[by_hash], ends - sizes
    order = np.arange(len(rows)) + np.repeat(heads - starts, sizes)
    begins = np.zeros(len(rows), np.bool_)
    begins[0] = True
    begins[starts[1:]] = _differ(words[heads[1:]], words[heads[:-1]])
    return order, begins


def hash_sources(rows: Rows) -> Hashes:
    """A hash of each row's address and port, uint64, shape (n,)."""
    return _hash(_words(rows))


def _words(rows: Rows) -> npt.NDArray[np.uint32]:
    """Rows as five numbers each: length and, above it, port; then the address."""
    return np.ascontiguousarray(rows).view("<u4").reshape(len(rows), -1)


def _differ(words: npt.NDArray[np.uint32], others: npt.NDArray[np.uint32]) -> Mask:
    """Which rows are of other sources than those beside them: column by column is what numpy does fastest."""
    differ: Mask = (words[:, 0] ^ others[:, 0]) > MAX_LENGTH
    for column in range(1, words.shape[1]):
        differ |= words[:, column] != others[:, column]
    return differ


def _hash(words: npt.NDArray[np.uint32]) -> Hashes:
    wide = words.astype(np.uint64)
    wide[:, 0] >>= np.uint64(16)  # the port alone
    hashes: Hashes = mix(wide @ _SPREAD)
    return hashes
