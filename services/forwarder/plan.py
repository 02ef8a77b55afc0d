"""How the rows of a batch leave: which go together in one UDP_SEGMENT send and which alone. No I/O.

A send with UDP_SEGMENT (udp(7)) hands the kernel one stretch of bytes and the length to cut it at: up to 64 datagrams
for the price of one, all of equal length but the last, which may be shorter.
"""

import socket
from typing import Final

import numpy as np
import numpy.typing as npt

from shared.batch import MAX_ROWS, DatagramBatch, Indices
from shared.mmsg import IOVEC, MMSGHDR, addresses_of

UDP_SEGMENT: Final = 103
MAX_SEGMENTS: Final = 64
"""UDP_MAX_SEGMENTS of kernels before 6.8, which allow 128 since."""
MAX_SEND: Final = 65_000
"""Bytes of one send: what UDP allows, less a margin for headers."""

CONTROL: Final = np.dtype([("len", "u8"), ("level", "i4"), ("type", "i4"), ("size", "u2"), ("_pad", "u1", 6)])
"""struct cmsghdr with the uint16 that UDP_SEGMENT takes, padded as CMSG_SPACE does."""
assert CONTROL.itemsize == 24

Lengths = npt.NDArray[np.int64]


def group(lengths: Lengths, largest_segment: int) -> npt.NDArray[np.intp]:
    """Return the rows at which a send begins, int64, shape (sends,); each send goes on to the next one's row.

    Rows of equal length that follow each other go together, as far as a send may; then a send takes the row behind it
    along when that one stands alone and is shorter. Rows longer than `largest_segment` go alone.
    """
    count = len(lengths)
    row = np.arange(count)
    begins = np.ones(count, np.bool_)
    begins[1:] = lengths[1:] != lengths[:-1]
    position = row - np.maximum.accumulate(np.where(begins, row, 0))
    most = np.minimum(MAX_SEGMENTS, MAX_SEND // np.maximum(lengths, 1))
    most[(lengths > largest_segment) | (lengths == 0)] = 1
    starts = np.flatnonzero(position % np.maximum(most, 1) == 0)
    return starts[~_tails(lengths, starts, most)]


def _tails(lengths: Lengths, starts: npt.NDArray[np.intp], most: Lengths) -> npt.NDArray[np.bool_]:
    """Which sends can be joined to the one before them as its shorter last datagram."""
    sizes = np.diff(starts, append=len(lengths))
    own, before = lengths[starts[1:]], lengths[starts[:-1]]
    room = (sizes[:-1] < most[starts[:-1]]) & (sizes[:-1] * before + own <= MAX_SEND)
    joins = np.zeros(len(starts), np.bool_)
    joins[1:] = (sizes[1:] == 1) & (own < before) & (own > 0) & room
    # A send that is itself joined can't take another along: of neighbours that could be joined, every second is.
    number = np.arange(len(starts))
    first = np.maximum.accumulate(np.where(joins, -1, number))
    joins &= (number - first) % 2 == 1
    return joins


class SendPlan:
    """A vector for sendmmsg(2), built for some rows of a batch and good for every collector that gets those rows.

    The sockets are connected, so no message names a destination. Memory is reused: a plan is good until the next
    `build`, and as long as the batch lives.
    """

    def __init__(self) -> None:
        self.headers = np.zeros(MAX_ROWS, MMSGHDR)
        self._iovecs = np.zeros(MAX_ROWS, IOVEC)
        self._controls = np.zeros(MAX_ROWS, CONTROL)
        self._controls["len"] = CONTROL.itemsize - 6
        self._controls["level"], self._controls["type"] = socket.IPPROTO_UDP, UDP_SEGMENT
        self._iovec_at = addresses_of(self._iovecs, IOVEC.itemsize, MAX_ROWS)
        self._control_at = addresses_of(self._controls, CONTROL.itemsize, MAX_ROWS)
        self.sends = self.rows = 0
        self.rows_before = np.zeros(1, np.int64)
        self.bytes_before = np.zeros(1, np.int64)

    def build(self, batch: DatagramBatch, indices: Indices | None, largest_segment: int) -> None:
        """Plan the sends of these rows (None: all). `largest_segment` 0 sends every datagram by itself.

        `rows_before[i]` and `bytes_before[i]` are how many rows and bytes the first i sends hold.
        """
        base = np.frombuffer(batch.payload, np.uint8).ctypes.data if memoryview(batch.payload).nbytes else 0
        lengths = batch.lengths if indices is None else batch.lengths[indices]
        offsets = batch.offsets[:-1] if indices is None else batch.offsets[indices]
        starts = group(lengths, largest_segment)
        self.sends = sends = len(starts)
        self.rows = len(lengths)
        self.rows_before = np.append(starts, len(lengths))
        self.bytes_before = np.concatenate(([0], np.cumsum(lengths)))[self.rows_before]
        headers = self.headers[:sends]
        if indices is None:  # neighbours in the plan are neighbours in memory: one piece a send
            pieces = self._iovecs[:sends]
            pieces["base"], pieces["len"] = offsets[starts] + base, np.diff(self.bytes_before)
            headers["iov"], headers["iovlen"] = self._iovec_at[:sends], 1
        else:
            pieces = self._iovecs[: len(lengths)]
            pieces["base"], pieces["len"] = offsets + base, lengths
            headers["iov"], headers["iovlen"] = self._iovec_at[starts], np.diff(self.rows_before)
        several = np.diff(self.rows_before) > 1
        self._controls["size"][:sends] = lengths[starts]
        headers["control"] = np.where(several, self._control_at[:sends], 0)
        headers["controllen"] = np.where(several, CONTROL.itemsize, 0)

    def segmented(self, number: int) -> bool:
        """Whether a send holds more than one datagram."""
        return bool(self.headers["controllen"][number])
