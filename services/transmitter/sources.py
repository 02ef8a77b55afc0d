"""Rows of one source brought together, without changing their order. No I/O."""

from collections.abc import Sequence
from typing import Final

import numpy as np

from shared.datagrams.batch import Indices
from shared.datagrams.gathered import Mask, Words
from shared.datagrams.sampling import Hashes, mix

MAX_LENGTH: Final = 0xFFFF
PART_BITS: Final = np.uint64(16)
"""Bits of a hash that are left where rows are in parts: enough for every row of a plan."""
_SPREAD: Final = np.array(
    [0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93, 0xFF51AFD7ED558CCD], np.uint64
)
"""Odd numbers without pattern, one for each 32 bits of a row: their products spread sources over 64 bits."""


def by_source(words: Words, parts: Sequence[int] = (0,)) -> tuple[Indices | None, Mask]:
    """Return the order that brings rows of one source together, and the rows that begin another source in it.

    `words` are rows as in `Gathered`. The order is None where they are together already. Rows stay in their part, and
    each part, whose first rows are in `parts`, begins another source. Two sources of one hash may stand mixed. That
    only costs frames, since the address itself shows where a source ends.
    """
    begins = np.ones(len(words), np.bool_)
    begins[1:] = _differ(words[1:], words[:-1])
    begins[list(parts)] = True
    heads = np.flatnonzero(begins)
    if len(heads) < 3:  # less than two stretches of one source with another in between
        return None, begins
    hashes = hash_sources(words[heads])
    if len(parts) > 1:  # the part counts first
        hashes = hashes >> PART_BITS | np.searchsorted(parts, heads, "right").astype(np.uint64) << (64 - PART_BITS)
    ordered = np.sort(hashes)
    if (ordered[1:] != ordered[:-1]).all():
        return None, begins
    # Stretches are moved, not rows: there are often far fewer of them.
    by_hash = np.argsort(hashes, kind="stable")
    ends = np.append(heads[1:], len(words))
    sizes = (ends - heads)[by_hash]
    heads, starts = heads[by_hash], np.cumsum(sizes) - sizes
    order = np.arange(len(words)) + np.repeat(heads - starts, sizes)
    begins = np.zeros(len(words), np.bool_)
    begins[0] = True
    begins[starts[1:]] = _differ(words[heads[1:]], words[heads[:-1]])
    begins[list(parts)] = True
    return order, begins


def hash_sources(words: Words) -> Hashes:
    """Return a hash of each row's address and port, uint64, shape (n,)."""
    wide = words.astype(np.uint64)
    wide[:, 0] >>= np.uint64(16)  # the port alone
    hashes: Hashes = mix(wide @ _SPREAD)
    return hashes


def hash_addresses(words: Words) -> Hashes:
    """Return a hash of each row's address alone, uint64, shape (n,)."""
    wide = words.astype(np.uint64)
    wide[:, 0] = 0
    hashes: Hashes = mix(wide @ _SPREAD)
    return hashes


def _differ(words: Words, others: Words) -> Mask:
    """Return the rows with another source than the row beside them; numpy is fastest column by column."""
    differ: Mask = (words[:, 0] ^ others[:, 0]) > MAX_LENGTH
    for column in range(words.shape[1] - 1, 0, -1):
        differ |= words[:, column] != others[:, column]
    return differ
