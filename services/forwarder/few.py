"""A few datagrams as plain objects: below some number of rows arrays cost more than they save. No I/O."""

import struct
from collections.abc import Sequence
from socket import IPPROTO_UDP
from typing import Final

from services.forwarder.plan import UDP_SEGMENT
from shared.datagrams.batch import Indices
from shared.datagrams.gathered import Gathered
from shared.datagrams.segments import MAX_SEGMENTS, MAX_SEND

FEW_ROWS: Final = 16
"""Rows of different lengths; more of them are planned with arrays."""


class Few:
    """Datagrams for one collector. With a `segment` all are so long, the last perhaps shorter: one send does."""

    __slots__ = ("controls", "lengths", "payloads", "segment", "whole")

    def __init__(self, payloads: Sequence[memoryview], lengths: list[int], whole: memoryview | None = None) -> None:
        self.payloads = payloads
        self.lengths = lengths
        self.whole = [whole] if whole is not None else payloads
        self.segment = segment_of(lengths)
        self.controls = [(IPPROTO_UDP, UDP_SEGMENT, struct.pack("=H", self.segment))]

    def part(self, indices: Indices) -> "Few":
        """Some of these rows."""
        rows = indices.tolist()
        return Few([self.payloads[row] for row in rows], [self.lengths[row] for row in rows])


def segment_of(lengths: list[int]) -> int:
    """The length to cut one send of all these at; 0 when they can't leave as one."""
    first, last = lengths[0], lengths[-1]
    several = 1 < len(lengths) <= MAX_SEGMENTS and first * len(lengths) <= MAX_SEND
    return first if several and 0 < last <= first and lengths.count(first) >= len(lengths) - (last < first) else 0


def few_of(batch: Gathered) -> Few | None:
    """The rows of a batch as plain objects, when they are few, or can leave as one send; else None."""
    if len(batch) > MAX_SEGMENTS or not len(batch):
        return None
    lengths = [length for each in batch.batches for length in each.length_list]
    if len(lengths) > FEW_ROWS and not segment_of(lengths):
        return None
    payloads, whole = [], None
    for each in batch.batches:
        payload, at = memoryview(each.payload), 0
        for length in each.length_list:
            payloads.append(payload[at : at + length])
            at += each.stride or length
        whole = payload if len(batch.batches) == 1 and not each.stride else None
    return Few(payloads, lengths, whole)
