"""How the rows of a batch leave by UDP: a vector for sendmmsg(2), with UDP_SEGMENT (udp(7)) where rows go together.

No I/O.
"""

import socket
from typing import Final

import numpy as np

from shared.batch import MAX_ROWS, DatagramBatch, Indices
from shared.mmsg import IOVEC, MMSGHDR, addresses_of
from shared.segments import group

UDP_SEGMENT: Final = 103
CONTROL: Final = np.dtype([("len", "u8"), ("level", "i4"), ("type", "i4"), ("size", "u2"), ("_pad", "u1", 6)])
"""struct cmsghdr with the uint16 that UDP_SEGMENT takes, padded as CMSG_SPACE does."""
assert CONTROL.itemsize == 24


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
