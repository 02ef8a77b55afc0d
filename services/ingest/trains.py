"""Splits trains: datagrams of one exporter that the kernel hands over as one piece (UDP_GRO, udp(7)). No I/O."""

import numpy as np
import numpy.typing as npt

Lengths = npt.NDArray[np.uint32]


def split_trains(sizes: Lengths, segments: Lengths) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the number of datagrams in each piece, shape (n,), and the length of each datagram, shape (their sum,).

    `sizes` are the bytes of each piece, shape (n,); `segments` the length that it is cut at, 0 for a single datagram.
    All datagrams of a train are equally long but the last, which may be shorter.

    >>> split_trains(np.array([250, 7, 200], np.uint32), np.array([100, 0, 100], np.uint32))[1].tolist()
    [100, 100, 50, 7, 100, 100]
    """
    whole = sizes.astype(np.int64)
    cut = np.where(segments == 0, np.maximum(whole, 1), segments).astype(np.int64)
    counts = np.maximum(1, -(-whole // cut))
    lengths = np.repeat(cut, counts)
    lengths[np.cumsum(counts) - 1] = whole - (counts - 1) * cut
    return counts, lengths
