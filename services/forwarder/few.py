"""A few datagrams as plain objects: below some number of rows arrays cost more than they save. No I/O."""

import struct
from socket import IPPROTO_UDP
from typing import Final

from services.forwarder.plan import UDP_SEGMENT
from shared.datagrams.batch import Indices
from shared.datagrams.gathered import Gathered
from shared.datagrams.segments import MAX_SEGMENTS, MAX_SEND

FEW_ROWS: Final = 16
"""Rows of different lengths; more of them are planned with arrays."""
_SIZE: Final = struct.Struct("=H")


class Few:
    """Datagrams for one collector: `sends` are the buffers of each send, which is cut at `segment` if that is not 0."""

    __slots__ = ("controls", "lengths", "segment", "sends")

    def __init__(self, pieces: list[memoryview], lengths: list[int], segment: int) -> None:
        """Plan `pieces`, a datagram each, or all in one where there is a segment."""
        self.lengths = lengths
        self.segment = segment
        self.sends = [pieces] if segment else [[piece] for piece in pieces]
        self.controls = [(IPPROTO_UDP, UDP_SEGMENT, _SIZE.pack(segment))] if segment else []


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
    """Rows of a batch (None: all) as plain objects, when they are few, or can leave as one send; else None."""
    if not 0 < len(batch) <= MAX_SEGMENTS:
        return None
    batches = batch.batches
    lengths = batches[0].length_list if len(batches) == 1 else [each for one in batches for each in one.length_list]
    if indices is not None:
        rows = indices.tolist()
        lengths = [lengths[row] for row in rows]
    segment = segment_of(lengths) if lengths else 0
    segment = segment if segment <= largest_segment else 0
    if not lengths or (len(lengths) > FEW_ROWS and not segment):
        return None
    if segment and indices is None and len(batches) == 1 and not batches[0].stride:
        return Few([memoryview(batches[0].payload)], lengths, segment)
    pieces = datagrams_of(batch)
    return Few(pieces if indices is None else [pieces[row] for row in rows], lengths, segment)
