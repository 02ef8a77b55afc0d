"""Selection of rows for collectors that want only some: 1-in-N sampling, and shares by hash of source. No I/O."""

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from shared.datagrams.batch import Indices
from shared.datagrams.gathered import Mask
from shared.datagrams.prefix_set import Datagrams, halves_of

Hashes = npt.NDArray[np.uint64]
_GOLDEN: Final = np.uint64(0x9E3779B97F4A7C15)
_MIX: Final = np.uint64(0xBF58476D1CE4E5B9)


def sample_rows(rows: Indices, one_in: int, before: int) -> Indices:
    """Return every `one_in`-th of these rows; `before` is the number of rows counted earlier."""
    return rows[-before % one_in :: one_in]


def share_rows(sources: Hashes, seeds: Sequence[np.uint64], wanted: Sequence[Mask]) -> list[Mask]:
    """Return the rows that each member of a group takes: of the members that want a row, the one of highest weight.

    Rendezvous hashing (Thaler and Ravishankar 1998): a member that joins or leaves moves only its own share.
    """
    weights = np.stack([
        np.where(wants, mix(sources ^ seed) | np.uint64(1), np.uint64(0))
        for seed, wants in zip(seeds, wanted, strict=True)
    ])  # fmt: skip
    winner = weights.argmax(axis=0)
    return [wants & (winner == number) for number, wants in enumerate(wanted)]


def hash_sources(batch: Datagrams) -> Hashes:
    """Return a hash of each row's source address, uint64, shape (n,)."""
    halves = halves_of(batch)
    return mix(halves[:, 0] * _GOLDEN ^ halves[:, 1])


def mix(values: Hashes) -> Hashes:
    """A well-spread hash of uint64 values (the finalizer of splitmix64, Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * _MIX
    return values ^ (values >> np.uint64(31))
