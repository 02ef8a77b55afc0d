"""Cuts datagrams that are longer than the MTU: the piece that each fragment carries. No I/O."""

import numpy as np
import numpy.typing as npt

from services.transmitter.packets.headers import FRAGMENT_SIZE, IP_SIZE, UDP_SIZE, Sums
from shared.datagrams.gso_runs import Mask


class Fragments:
    """The frames of a plan in which some units are longer than the MTU: those are cut at multiples of 8 bytes."""

    def __init__(self, totals: npt.NDArray[np.int64], large: Mask, mtu: int, version: int) -> None:
        extension = FRAGMENT_SIZE if version == 6 else 0
        piece = mtu - IP_SIZE[version] - extension & ~7
        counts = np.where(large, -(-totals // piece), 1)
        self.first_frame = np.append(0, np.cumsum(counts))
        self.large_units = large
        self.unit_of = np.repeat(np.arange(len(large)), counts)
        self.large = large[self.unit_of]
        number = np.arange(len(self.unit_of)) - self.first_frame[self.unit_of]
        whole = totals[self.unit_of]
        self._offsets = number * piece
        self.sizes = np.where(self.large, np.minimum(piece, whole - self._offsets), whole)
        self._more = self._offsets + self.sizes < whole
        # The UDP header is the first 8 bytes of the packet that is cut, and stands in the headers of the first frame.
        first = number == 0
        self.payload_offsets = np.where(first, 0, self._offsets - UDP_SIZE)
        self.payload_sizes = self.sizes - np.where(first, UDP_SIZE, 0)
        self.extra = np.where(self.large, extension - np.where(first, 0, UDP_SIZE), 0)

    def words(self, more: int, unit: int) -> Sums:
        """Return each frame's offset, in units of `unit` bytes, with the flag `more` unless it is the last."""
        words: Sums = (self._offsets // unit + np.where(self._more, more, 0)).astype(np.uint32)
        return words
