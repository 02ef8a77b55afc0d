"""Groups the rows of a batch that leave together: neighbours of equal length, in one piece that is cut later. No I/O.

The kernel takes one stretch of bytes and the length to cut it at, by UDP_SEGMENT (udp(7)) or by a virtio_net_hdr of
type UDP_L4. This sends many datagrams for the price of one. All have equal length but the last, which may be shorter.
"""

from typing import Final

import numpy as np
import numpy.typing as npt

MAX_SEGMENTS: Final = 64
"""UDP_MAX_SEGMENTS of kernels before 6.8, which allow 128 since."""
MAX_SEND: Final = 65_000
"""Bytes of one send: UDP's limit, less a margin for headers."""

Lengths = npt.NDArray[np.int64]
Starts = npt.NDArray[np.intp]
Mask = npt.NDArray[np.bool_]


def group(lengths: Lengths, largest_segment: int, apart: Mask | None = None) -> Starts:
    """Return the rows at which a send begins, int64, shape (sends,); each send ends where the next begins.

    Rows of equal length that follow each other go together, up to the limits of a send. A send also takes the row
    behind it when that row stands alone and is shorter. Rows longer than `largest_segment` go alone, and a row that is
    `apart`, shape (n,), never goes with the one before it.
    """
    begins = np.ones(len(lengths), np.bool_)
    np.not_equal(lengths[1:], lengths[:-1], out=begins[1:])
    if apart is not None:
        begins |= apart
    starts = np.flatnonzero(begins)
    sizes = np.append(starts[1:], len(lengths)) - starts
    length = lengths[starts]
    most = np.clip(MAX_SEND // np.maximum(length, 1), 1, MAX_SEGMENTS)
    most[(length > largest_segment) | (length == 0)] = 1
    if (sizes > most).any():
        starts, sizes, most = _split(starts, sizes, most)
    if len(starts) == 1 or (apart is not None and apart[starts].all()):
        return starts
    return starts[~_tails(lengths, starts, sizes, most, apart)]


def _split(starts: Starts, sizes: Starts, most: Lengths) -> tuple[Starts, Starts, Lengths]:
    """Cut runs that are longer than a send may be."""
    sends = -(-sizes // most)
    run = np.repeat(np.arange(len(starts)), sends)
    number = np.arange(len(run)) - (np.cumsum(sends) - sends)[run]
    most = most[run]
    return starts[run] + number * most, np.minimum(most, sizes[run] - number * most), most


def _tails(lengths: Lengths, starts: Starts, sizes: Starts, most: Lengths, apart: Mask | None) -> Mask:
    """Return the sends that can be joined to the one before them as its shorter last datagram."""
    own, before = lengths[starts[1:]], lengths[starts[:-1]]
    room = (sizes[:-1] < most[:-1]) & (sizes[:-1] * before + own <= MAX_SEND)
    joins = np.zeros(len(starts), np.bool_)
    joins[1:] = (sizes[1:] == 1) & (own < before) & (own > 0) & room
    if apart is not None:
        joins &= ~apart[starts]
    # A joined send can't take another along: of neighbours that could be joined, every second one is.
    number = np.arange(len(starts))
    first = np.maximum.accumulate(np.where(joins, -1, number))
    joins &= (number - first) % 2 == 1
    return joins


def pieces(pointers: Starts, lengths: Lengths, starts: Starts) -> tuple[Starts, Starts]:
    """Return the rows at which a piece of memory begins, and the number of pieces of each send.

    A send gathers its payloads from pieces of memory; neighbours in memory are one piece.
    """
    begins = np.ones(len(lengths), np.bool_)
    np.not_equal(pointers[1:], pointers[:-1] + lengths[:-1], out=begins[1:])
    begins[starts] = True
    rows = np.flatnonzero(begins)
    if len(rows) == len(starts):
        return rows, np.ones(len(starts), np.intp)
    return rows, np.diff(np.append(np.searchsorted(rows, starts), len(rows)))
