"""Selection of rows for collectors that want only some: 1-in-N sampling, and shares by hash of source. No I/O."""

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from shared.datagrams.batch import Indices
from shared.datagrams.gathered import Mask
from shared.datagrams.limits import BUCKETS
from shared.datagrams.prefix_set import Datagrams
from shared.net.addresses import V4_MAPPED

Hashes = npt.NDArray[np.uint64]
Buckets = npt.NDArray[np.uint32]
_GOLDEN: Final = np.uint64(0x9E3779B97F4A7C15)
_MIX: Final = np.uint64(0xBF58476D1CE4E5B9)
_ROUND: Final = ((0, 2, 1, 4), (1, 0, 2, 6), (2, 1, 0, 8), (0, 2, 1, 16), (1, 0, 2, 19), (2, 1, 0, 4))
_LAST: Final = ((2, 1, 14), (0, 2, 11), (1, 0, 25), (2, 1, 16), (0, 2, 4), (1, 0, 14), (2, 1, 24))
"""The steps of `jhash` (linux/jhash.h) on its words a, b and c."""


def sample_rows(rows: Indices, one_in: int, before: int) -> Indices:
    """Return every `one_in`-th of these rows; `before` is the number of rows counted earlier."""
    return rows[-before % one_in :: one_in]


def share_rows(buckets: Buckets, seeds: Sequence[np.uint64], wanted: Sequence[Mask]) -> list[Mask]:
    """Return the rows that each member of a group takes: of the members that want a row, the one of highest weight.

    Rendezvous hashing (Thaler and Ravishankar 1998): a member that joins or leaves moves only its own share. Rows of
    one bucket have the same weights.
    """
    hashes = mix(buckets * _GOLDEN)
    weights = np.stack([
        np.where(wants, mix(hashes ^ seed) | np.uint64(1), np.uint64(0))
        for seed, wants in zip(seeds, wanted, strict=True)
    ])  # fmt: skip
    winner = weights.argmax(axis=0)
    return [wants & (winner == number) for number, wants in enumerate(wanted)]


def share_buckets(seeds: Sequence[np.uint64]) -> list[bytes]:
    """Return the buckets that each member of a group takes, where all want the same, a bit for each bucket."""
    everything = np.full(BUCKETS, True)
    shares = share_rows(np.arange(BUCKETS, dtype=np.uint32), seeds, [everything] * len(seeds))
    return [np.packbits(share).tobytes() for share in shares]


def find_share(share: bytes, buckets: Buckets) -> Mask:
    """Return the rows whose bucket is in a share, as `share_buckets` makes it."""
    found: Mask = np.unpackbits(np.frombuffer(share, np.uint8)).view(np.bool_)[buckets]
    return found


def find_buckets(batch: Datagrams) -> Buckets:
    """Return the bucket of each row's source address, uint32, shape (n,).

    The kernel finds the same one: it is `jhash` (linux/jhash.h) of the 16 bytes, of which it takes the upper bits.
    """
    words = np.ascontiguousarray(batch.rows["address"]).view(np.uint32)
    mixed = [*(_MAPPED if (words[:, :3] == _MAPPED_WORDS).all() else _mix_words(words))]
    mixed[0] = mixed[0] + words[:, 3].view("<u4")
    for to, by, bits in _LAST:
        mixed[to] = (mixed[to] ^ mixed[by]) - _rotate(mixed[by], bits)
    return mixed[2] >> np.uint32(32 - BUCKETS.bit_length() + 1)


def _mix_words(words: Buckets) -> list[Buckets]:
    """Return the state of `jhash` behind the first three words of each row, of shape (n, 3) or more."""
    mixed = [words[:, place] + np.uint32(0xDEADBEEF + 16) for place in range(3)]
    for to, less, more, bits in _ROUND:
        mixed[to] = (mixed[to] - mixed[less]) ^ _rotate(mixed[less], bits)
        mixed[less] = mixed[less] + mixed[more]
    return mixed


def _rotate(words: Buckets, bits: int) -> Buckets:
    return words << np.uint32(bits) | words >> np.uint32(32 - bits)


_MAPPED_WORDS: Final = np.frombuffer(V4_MAPPED, np.uint32)
_MAPPED: Final = _mix_words(_MAPPED_WORDS[None])
"""The same for every IPv4 address."""


def mix(values: Hashes) -> Hashes:
    """A well-spread hash of uint64 values (the finalizer of splitmix64, Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * _MIX
    return values ^ (values >> np.uint64(31))
