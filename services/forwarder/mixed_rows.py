"""Some rows of different lengths, planned one by one: below some number arrays cost more than they save. No I/O.

They leave in waves as in `order.by_length`, by sends like those of `SendPlan`.
"""

import socket
import struct
from typing import Final

import numpy as np

from services.forwarder.plan import CONTROL, UDP_SEGMENT
from shared.datagrams.batch import Indices
from shared.datagrams.gathered import Gathered
from shared.datagrams.gso_runs import MAX_SEGMENTS, MAX_SEND
from shared.datagrams.mmsg import IOVEC, MMSGHDR, addresses_of, send

MIXED_ROWS: Final = 128
"""Rows; more are shared out among threads when there are several collectors."""
_ROW: Final = struct.Struct("<H18s")
"""Length, then port and address, which tell an exporter from another."""
_MESSAGE, _PIECE, _CONTROL = (dtype.itemsize // 8 for dtype in (MMSGHDR, IOVEC, CONTROL))
"""Sizes in words of 8 bytes."""
_IOV, _SIZE = 2, 2
"""Words of a `MMSGHDR` from which on pieces and control messages stand, and of a `CONTROL` with its size."""


class Vector:
    """Memory of the messages for sendmmsg(2) of one plan at a time."""

    def __init__(self) -> None:
        messages, pieces, controls = (np.zeros(MIXED_ROWS, dtype) for dtype in (MMSGHDR, IOVEC, CONTROL))
        controls["len"], controls["level"], controls["type"] = CONTROL.itemsize - 6, socket.IPPROTO_UDP, UDP_SEGMENT
        self.messages = messages
        self.messages_at = int(messages.ctypes.data)
        self.pieces_at: list[int] = addresses_of(pieces, IOVEC.itemsize, MIXED_ROWS).tolist()
        self.controls_at: list[int] = addresses_of(controls, CONTROL.itemsize, MIXED_ROWS).tolist()
        self.message_words, self.piece_words, self.control_words = (
            array.view(np.uint8).data.cast("Q") for array in (messages, pieces, controls)
        )
        self.holds: MixedRows | None = None


class MixedRows:
    """Rows for one collector after the other; `rows` and `sizes` are how many datagrams and bytes each send holds."""

    def __init__(self, batch: Gathered, sends: list[list[int]], lengths: list[int], vector: Vector) -> None:
        self.templates = False
        self._batch = batch
        self._sends = sends
        self._lengths = lengths
        self._vector = vector
        self.rows = [len(each) for each in sends]
        self.sizes = [sum([lengths[row] for row in each]) for each in sends]

    def send(self, sock: socket.socket) -> tuple[int, int]:
        """Send; return the number of sends that have left, and the errno where it was none."""
        if self._vector.holds is not self:
            self._build()
        return send(sock.fileno(), self._vector.messages_at, 0, len(self._sends))

    def _build(self) -> None:
        vector, lengths, places = self._vector, self._lengths, self._batch.places
        messages, pieces, controls = vector.message_words, vector.piece_words, vector.control_words
        at, message = 0, _IOV
        for number, rows in enumerate(self._sends):
            several = len(rows) > 1
            messages[message], messages[message + 1] = vector.pieces_at[at], len(rows)
            messages[message + 2] = vector.controls_at[number] if several else 0
            messages[message + 3] = CONTROL.itemsize if several else 0
            if several:
                controls[number * _CONTROL + _SIZE] = lengths[rows[0]]
            for row in rows:
                pieces[at * _PIECE], pieces[at * _PIECE + 1] = places[row], lengths[row]
                at += 1
            message += _MESSAGE
        vector.holds = self

    def rest(self, sent: int, _indices: Indices | None) -> Indices:
        """Return the rows of the batch that are left when the first sends have gone."""
        return np.array(sorted(row for rows in self._sends[sent:] for row in rows), np.intp)


def mixed_of(batch: Gathered, indices: Indices | None, largest_segment: int, vector: Vector) -> MixedRows | None:
    """Return a plan for rows of a batch (None: all); None where they are none, or too many."""
    if len(batch) > MIXED_ROWS:
        return None
    columns = list(_ROW.iter_unpack(batch.packed))
    last: dict[bytes, tuple[int, int]] = {}
    ordered: list[tuple[int, int, int]] = []
    for row in range(len(batch)) if indices is None else indices.tolist():
        length, exporter = columns[row]
        before, wave = last.get(exporter, (length, 0))
        wave += length > before
        last[exporter] = length, wave
        ordered.append((wave, -length, row))
    ordered.sort()
    sends: list[list[int]] = []
    segment = room = 0
    for _, minus_length, row in ordered:
        length = -minus_length
        if 0 < length <= segment and length <= room and len(sends[-1]) < MAX_SEGMENTS:
            sends[-1].append(row)
            room -= length
            segment = segment if length == segment else 0  # a shorter one is the last
        else:
            sends.append([row])
            segment, room = length if length <= largest_segment else 0, MAX_SEND - length
    if not sends:
        return None
    return MixedRows(batch, sends, [length for length, _ in columns], vector)
