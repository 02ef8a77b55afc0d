"""An order of rows in which more of them can leave together; each exporter's stay in their order. No I/O."""

from typing import Final

import numpy as np

from shared.datagrams.batch import Indices
from shared.datagrams.gathered import Words
from shared.datagrams.gso_runs import Lengths

LONGEST: Final = np.uint16(0xFFFF)
_SPREAD: Final = np.array([0, 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F], np.uint32)
"""Odd numbers without pattern: their products spread addresses over 16 bits."""


def by_length(words: Words, lengths: Lengths) -> Indices:
    """Return an order of rows, int64, shape (n,): waves, longest first in each; `words` are as in `Gathered`.

    An exporter's rows are in one wave as long as each is no longer than the one before it, so they keep their order.
    Exporters with equal hashes count as one, which only makes waves smaller.
    """
    exporters = ((words * _SPREAD).sum(axis=1, dtype=np.uint32) >> np.uint32(16)).astype(np.uint16)
    together = np.argsort(exporters, kind="stable")  # 16 bits: a radix sort, the fastest there is
    begins = np.flatnonzero(np.diff(exporters[together], prepend=~exporters[together[:1]]))
    grows = np.diff(lengths[together], prepend=0) > 0
    grows[begins] = False
    wave = np.cumsum(grows)
    waves = np.empty(len(words), np.uint16)
    waves[together] = wave - np.repeat(wave[begins], np.diff(begins, append=len(words)))
    longest_first = np.argsort(LONGEST - lengths.astype(np.uint16), kind="stable")
    return longest_first[np.argsort(waves[longest_first], kind="stable")]
