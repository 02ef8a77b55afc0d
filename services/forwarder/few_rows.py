"""A few datagrams as plain objects: below some number of rows arrays cost more than they save. No I/O."""

import socket
import struct
from socket import IPPROTO_UDP
from typing import Final

import numpy as np

from services.forwarder.plan import UDP_SEGMENT
from shared.datagrams.batch import Indices
from shared.datagrams.gathered import Gathered
from shared.datagrams.gso_runs import MAX_SEGMENTS, MAX_SEND

FEW_ROWS: Final = 4
"""Rows of different lengths; more of them are for `mixed_rows`."""
MOST_EQUAL: Final = 512
"""Rows; more are shared out among threads when there are several collectors."""
_SIZE: Final = struct.Struct("=H")


class Few:
    """Datagrams for one collector: `sends` are the buffers of each send, which is cut at `segment` if that is not 0.

    `rows` and `sizes` are how many datagrams and bytes each send holds.
    """

    __slots__ = ("controls", "rows", "segment", "sends", "sizes", "templates")

    def __init__(self, sends: list[list[memoryview]], rows: list[int], sizes: list[int], segment: int) -> None:
        self.templates = False
        self.sends = sends
        self.rows = rows
        self.sizes = sizes
        self.segment = segment
        self.controls = [(IPPROTO_UDP, UDP_SEGMENT, _SIZE.pack(segment))] if segment else []

    def send(self, sock: socket.socket) -> tuple[int, int]:
        """Send; return the number of sends that have left, and the errno that ended it, else 0."""
        sent = 0
        try:
            for buffers in self.sends:
                sock.sendmsg(buffers, self.controls)
                sent += 1
        except OSError as error:
            return sent, error.errno or 0
        return sent, 0

    def rest(self, sent: int, indices: Indices | None) -> Indices:
        """Return the rows of the batch that are left of these when the first sends have gone."""
        first = sum(self.rows[:sent])
        return np.arange(first, sum(self.rows)) if indices is None else indices[first:]


def equal_of(batch: Gathered, largest_segment: int) -> Few | None:
    """All rows of a batch in as few sends as there can be, when they are equally long and stand end to end."""
    (only, *others) = batch.batches
    column = only.rows["length"]
    length = int(column[0])
    if others or not 0 < length <= largest_segment or only.stride not in (0, length):
        return None
    if int(np.minimum.reduce(column)) != length or int(np.maximum.reduce(column)) != length:
        return None
    count, payload = len(column), memoryview(only.payload)
    most = min(MAX_SEGMENTS, MAX_SEND // length)
    rows = [min(most, count - first) for first in range(0, count, most)]
    sends = [[payload[at : at + most * length]] for at in range(0, count * length, most * length)]
    return Few(sends, rows, [each * length for each in rows], length)


def segment_of(lengths: list[int]) -> int:
    """The length to cut one send of all these at; 0 when they can't leave as one."""
    count, first, last = len(lengths), lengths[0], lengths[-1]
    if not 1 < count <= MAX_SEGMENTS or first * count > MAX_SEND or not 0 < last <= first:
        return 0
    return first if lengths.count(first) >= count - (last < first) else 0


def datagrams_of(batch: Gathered) -> list[memoryview]:
    """Every payload by itself."""
    found = []
    for each in batch.batches:
        payload, at = memoryview(each.payload), 0
        for length in each.length_list:
            found.append(payload[at : at + length])
            at += each.stride or length
    return found


def few_of(batch: Gathered, indices: Indices | None, largest_segment: int) -> Few | None:
    """Rows of a batch (None: all) as plain objects, when they are few, or leave in a few sends; else None."""
    if indices is None and MAX_SEGMENTS < len(batch) <= MOST_EQUAL:
        return equal_of(batch, largest_segment)
    if not 0 < len(batch) <= MAX_SEGMENTS:
        return None
    batches = batch.batches
    lengths = batches[0].length_list if len(batches) == 1 else [each for one in batches for each in one.length_list]
    if indices is not None:
        numbers = indices.tolist()
        lengths = [lengths[number] for number in numbers]
    segment = segment_of(lengths) if lengths else 0
    segment = segment if segment <= largest_segment else 0
    if not lengths or (len(lengths) > FEW_ROWS and not segment):
        return None
    if segment and indices is None and len(batches) == 1 and not batches[0].stride:
        return Few([[memoryview(batches[0].payload)]], [len(lengths)], [sum(lengths)], segment)
    pieces = datagrams_of(batch)
    if indices is not None:
        pieces = [pieces[number] for number in numbers]
    if segment:
        return Few([pieces], [len(lengths)], [sum(lengths)], segment)
    return Few([[piece] for piece in pieces], [1] * len(lengths), lengths, 0)
