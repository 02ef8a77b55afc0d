"""Which rows of a batch leave together: neighbours of equal length, as one piece that kernel or device cuts up. No I/O.

The kernel takes one stretch of bytes and the length to cut it at, by UDP_SEGMENT (udp(7)) as by a virtio_net_hdr of
type UDP_L4: many datagrams for the price of one, all of equal length but the last, which may be shorter.
"""

from typing import Final

import numpy as np
import numpy.typing as npt

MAX_SEGMENTS: Final = 64
"""UDP_MAX_SEGMENTS of kernels before 6.8, which allow 128 since."""
MAX_SEND: Final = 65_000
"""Bytes of one send: what UDP allows, less a margin for headers."""

Lengths = npt.NDArray[np.int64]
Starts = npt.NDArray[np.intp]
Mask = npt.NDArray[np.bool_]


def group(lengths: Lengths, largest_segment: int, apart: Mask | None = None) -> Starts:
    """Return the rows at which a send begins, int64, shape (sends,); each send goes on to the next one's row.

    Rows of equal length that follow each other go together, as far as a send may; then a send takes the row behind it
    along when that one stands alone and is shorter. Rows longer than `largest_segment` go alone, and a row that
    is `apart`, shape (n,), never goes with the one before it.
    """
    count = len(lengths)
    row = np.arange(count)
    begins = np.ones(count, np.bool_)
    begins[1:] = lengths[1:] != lengths[:-1]
    if apart is not None:
        begins |= apart
    position = row - np.maximum.accumulate(np.where(begins, row, 0))
    most = np.minimum(MAX_SEGMENTS, MAX_SEND // np.maximum(lengths, 1))
    most[(lengths > largest_segment) | (lengths == 0)] = 1
    starts = np.flatnonzero(position % np.maximum(most, 1) == 0)
    return starts[~_tails(lengths, starts, most, apart)]


def _tails(lengths: Lengths, starts: Starts, most: Lengths, apart: Mask | None) -> Mask:
    """Which sends can be joined to the one before them as its shorter last datagram."""
    sizes = np.diff(starts, append=len(lengths))
    own, before = lengths[starts[1:]], lengths[starts[:-1]]
    room = (sizes[:-1] < most[starts[:-1]]) & (sizes[:-1] * before + own <= MAX_SEND)
    joins = np.zeros(len(starts), np.bool_)
    joins[1:] = (sizes[1:] == 1) & (own < before) & (own > 0) & room
    if apart is not None:
        joins &= ~apart[starts]
    # A send that is itself joined can't take another along: of neighbours that could be joined, every second is.
    number = np.arange(len(starts))
    first = np.maximum.accumulate(np.where(joins, -1, number))
    joins &= (number - first) % 2 == 1
    return joins
