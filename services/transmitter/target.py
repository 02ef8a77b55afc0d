"""Where a collector's copies go, and the numbers that its packets carry. No I/O."""

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from services.transmitter.headers import Sums
from shared.routing import Hashes


@dataclass(frozen=True, slots=True)
class Target:
    """Where copies go: a collector's address (4 or 16 bytes) and port, and how its packets are marked.

    `ethernet` is the 14 bytes of link header; empty where raw IP packets are sent.
    """

    version: int
    address: bytes
    port: int
    hop_limit: int
    dscp: int
    link_index: int = 0
    ethernet: bytes = b""


class Identification:
    """The numbers that tell a collector's packets apart, so that fragments of different datagrams never mix.

    IPv4 has 16 bits only, so fragmented datagrams count by source, in buckets (as Linux does, net/ipv4/route.c):
    a number comes again after 65,536 fragmented datagrams of a source or of those that share its bucket.
    """

    BUCKETS: Final = 1024

    def __init__(self) -> None:
        self._draw = np.random.default_rng()
        self._next = int(self._draw.integers(1 << 32))
        self._by_bucket: npt.NDArray[np.uint32] | None = None

    def take(self, before: npt.NDArray[np.int64]) -> Sums:
        """Return the first number of each of several units, the first n of which take `before[n]` numbers."""
        first: Sums = (before[:-1] + self._next).astype(np.uint32)
        self._next = (self._next + int(before[-1])) & 0xFFFFFFFF
        return first

    def take_for_fragments(self, sources: Hashes) -> Sums:
        """Return a number for each fragmented datagram, given the hashes of their sources."""
        if self._by_bucket is None:
            self._by_bucket = self._draw.integers(1 << 32, size=self.BUCKETS, dtype=np.uint32)
        taken = np.empty(len(sources), np.uint32)
        for number, bucket in enumerate((sources % np.uint64(self.BUCKETS)).tolist()):
            taken[number] = self._by_bucket[bucket]
            self._by_bucket[bucket] += np.uint32(1)
        return taken
