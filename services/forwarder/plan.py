"""Plans the sends of a batch by UDP: a vector for sendmmsg(2), with UDP_SEGMENT (udp(7)) where rows go together.

No I/O.
"""

import socket
from collections.abc import Sequence
from ctypes import string_at
from typing import Final

import numpy as np

from services.forwarder.order import by_length
from shared.datagrams.batch import Indices
from shared.datagrams.gathered import MAX_GATHERED, Gathered
from shared.datagrams.gso_runs import group, pieces
from shared.datagrams.mmsg import IOVEC, MMSGHDR, addresses_of

UDP_SEGMENT: Final = 103
CONTROL: Final = np.dtype([("len", "u8"), ("level", "i4"), ("type", "i4"), ("size", "u2"), ("_pad", "u1", 6)])
"""struct cmsghdr with the uint16 that UDP_SEGMENT takes, padded as CMSG_SPACE does."""
assert CONTROL.itemsize == 24
WORTH_ORDERING: Final = 32
"""Rows; fewer gain less than the ordering costs."""
ROWS_A_SEND: Final = 4
"""Rows that leave together; with this many already, another order saves little."""


class SendPlan:
    """A vector for sendmmsg(2), built for some rows of a batch and good for every collector that gets those rows.

    The sockets are connected, so no message names a destination. Memory is reused: a plan is good until the next
    `build`, and as long as the batch lives.
    """

    def __init__(self) -> None:
        self.headers = np.zeros(MAX_GATHERED, MMSGHDR)
        self._iovecs = np.zeros(MAX_GATHERED, IOVEC)
        self._controls = np.zeros(MAX_GATHERED, CONTROL)
        self._controls["len"] = CONTROL.itemsize - 6
        self._controls["level"], self._controls["type"] = socket.IPPROTO_UDP, UDP_SEGMENT
        self._iovec_at = addresses_of(self._iovecs, IOVEC.itemsize, MAX_GATHERED)
        self._control_at = addresses_of(self._controls, CONTROL.itemsize, MAX_GATHERED)
        self.sends = self.rows = 0
        self.templates = False
        """True if the rows are templates, which are counted apart."""
        self._rows_of_batch: Indices | None = None
        self._first_sends = [0, 0]
        self._first_vectors = np.zeros(0, np.int64)
        self.rows_before = np.zeros(1, np.int64)
        self.bytes_before = np.zeros(1, np.int64)

    def build(
        self, batch: Gathered, indices: Indices | None, largest_segment: int, parts: Sequence[int] = (0,)
    ) -> None:
        """Plan the sends of these rows (None: all). `largest_segment` 0 sends every datagram by itself.

        `parts` are the positions, among the planned rows, at which another collector's rows begin. `rows_before[i]` and
        `bytes_before[i]` are the rows and bytes of the first i sends.
        """
        lengths = batch.lengths if indices is None else batch.lengths[indices]
        apart = None
        if len(parts) > 1:
            apart = np.zeros(len(lengths), np.bool_)
            apart[list(parts)] = True
        starts = group(lengths, largest_segment, apart)
        if (
            apart is None
            and largest_segment
            and len(lengths) >= WORTH_ORDERING
            and len(starts) * ROWS_A_SEND > len(lengths)
        ):
            order = by_length(batch.words if indices is None else batch.words[indices], lengths)
            indices, lengths = order if indices is None else indices[order], lengths[order]
            starts = group(lengths, largest_segment)
        self._rows_of_batch, self.templates = indices, batch.templates
        pointers = batch.pointers if indices is None else batch.pointers[indices]
        begins, counts = pieces(pointers, lengths, starts)
        self.sends = sends = len(starts)
        self.rows = len(lengths)
        self._first_sends = [*np.searchsorted(starts, parts).tolist(), sends]
        self.rows_before = np.append(starts, len(lengths))
        bytes_before = np.append(0, np.cumsum(lengths))
        self.bytes_before = bytes_before[self.rows_before]
        iovecs = self._iovecs[: len(begins)]
        iovecs["base"], iovecs["len"] = pointers[begins], np.diff(bytes_before[begins], append=bytes_before[-1])
        headers = self.headers[:sends]
        self._first_vectors = np.cumsum(counts) - counts
        headers["iov"], headers["iovlen"] = self._iovec_at[self._first_vectors], counts
        several = np.diff(self.rows_before) > 1
        self._controls["size"][:sends] = lengths[starts]
        headers["control"] = np.where(several, self._control_at[:sends], 0)
        headers["controllen"] = np.where(several, CONTROL.itemsize, 0)

    def sends_of(self, part: int) -> tuple[int, int]:
        """Return the first send of a part, and that of the next."""
        return self._first_sends[part], self._first_sends[part + 1]

    def rows_of(self, part: int) -> int:
        """Return the number of rows of a part."""
        first, stop = self.sends_of(part)
        return int(self.rows_before[stop] - self.rows_before[first])

    def rest(self, sent: int, part: int = 0) -> Indices:
        """Return the rows of the batch that are left of a part when its first `sent` are done."""
        first, last = (int(self.rows_before[send]) for send in self.sends_of(part))
        return (
            np.arange(first + sent, last) if self._rows_of_batch is None else self._rows_of_batch[first + sent : last]
        )

    def first_datagram(self, number: int) -> bytes:
        """Return a copy of the payload of a send's first datagram."""
        size = int(self.bytes_before[number + 1] - self.bytes_before[number])
        if self.segmented(number):
            size = int(self._controls["size"][number])
        # A datagram is never in two pieces: its first one begins at the send's first vector.
        return string_at(int(self._iovecs["base"][self._first_vectors[number]]), size)

    def segmented(self, number: int) -> bool:
        """Return whether a send holds more than one datagram."""
        return bool(self.headers["controllen"][number])
