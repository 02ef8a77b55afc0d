"""Rows of one source brought together, without changing their order. No I/O."""

from typing import Final

import numpy as np

from shared.batch import Indices, Rows
from shared.routing import Hashes, mix
from shared.segments import Mask

_SPREAD: Final = np.array(
    [0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93, 0xFF51AFD7ED558CCD], np.uint64
)
"""Odd numbers without pattern, one for each 32 bits of a row: their products spread sources over 64 bits."""


def by_source(rows: Rows) -> tuple[Indices | None, Mask]:
    """Return the order that brings rows of one source together, and which rows begin another source, in that order.

    The order is None where they are together already. Two sources of one hash may stand mixed: that only costs frames,
    since where one ends is seen by the address itself.
    """
    begins = _begins(rows)
    heads = np.flatnonzero(begins)
    if len(heads) < 3:  # not even two stretches of one source with another in between
        return None, begins
    hashes = hash_sources(rows[heads])
    if (np.diff(np.sort(hashes)) != 0).all():
        return None, begins
    order = np.argsort(np.repeat(hashes, np.diff(heads, append=len(rows))), kind="stable")
    return order, _begins(rows[order])


def _begins(rows: Rows) -> Mask:
    """Which rows have another source than the row before them."""
    words = np.ascontiguousarray(rows).view("<u2").reshape(len(rows), -1)[:, 1:]  # without the length
    begins = np.ones(len(rows), np.bool_)
    np.any(words[1:] != words[:-1], axis=1, out=begins[1:])
    return begins


def hash_sources(rows: Rows) -> Hashes:
    """A hash of each row's address and port, uint64, shape (n,)."""
    words = np.ascontiguousarray(rows).view("<u4").reshape(len(rows), -1).astype(np.uint64)
    words[:, 0] >>= np.uint64(16)  # the port; the length is below it
    hashes: Hashes = mix(words @ _SPREAD)
    return hashes
