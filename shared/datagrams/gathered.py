"""Batches of one stream that wait together, handled as one: more rows share the cost of each step.

Under load a service finds many batches waiting, and the cost of planning is one of array operations, hardly of rows.
Only the 20 bytes a row are copied: payloads stay where ZeroMQ received them.
"""

import ctypes
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Final, TypeVar

import numpy as np
import numpy.typing as npt

from shared.datagrams.batch import FEW_ROWS, MAPPED, ROW, DatagramBatch, Generations, Indices, Rows
from shared.datagrams.limits import MAX_ROWS
from shared.net.addresses import V4_MAPPED

MAX_GATHERED: Final = 4 * MAX_ROWS
"""Rows; more would save little, and delay the first of them."""
MAX_GATHERED_PAYLOAD: Final = 8 << 20
"""Bytes; from here on no further batch is added."""
Mask = npt.NDArray[np.bool_]
Words = npt.NDArray[np.uint32]


T = TypeVar("T")


def portions(items: Iterable[T], rows_of: Callable[[T], int]) -> Iterator[list[T]]:
    """Yield items in order, in lists of at most `MAX_GATHERED` rows together or of a single item."""
    portion: list[T] = []
    room = MAX_GATHERED
    for item in items:
        rows = rows_of(item)
        if portion and room < rows:
            yield portion
            portion, room = [], MAX_GATHERED
        portion.append(item)
        room -= rows
    if portion:
        yield portion


class Gathered:
    """Datagrams of one stream, in the order they came; `rows` has dtype `ROW`, shape (n,).

    `templates` says that they were made of what ingest had kept of flow exporters: sent, they are no copies.
    """

    def __init__(self, batches: Sequence[DatagramBatch], *, templates: bool = False) -> None:
        self.stream = batches[0].stream
        self.templates = templates
        self.batches = tuple(batches)
        # Joined as bytes: numpy would handle each field by itself.
        rows = [each.rows for each in batches]
        self.packed = rows[0].tobytes() if len(rows) == 1 else b"".join([each.data for each in rows])
        """The rows as bytes, for where they are few."""
        self.rows: Rows = rows[0] if len(rows) == 1 else np.frombuffer(self.packed, ROW)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def generations(self) -> Generations | None:
        """The generation of the kernel's rules that has copied each row, uint16, shape (n,); None: none was copied."""
        for batch in self.batches:
            if batch.generations is not None:
                return self._generations
        return None

    @cached_property
    def _generations(self) -> Generations:
        found = [
            np.zeros(len(batch), np.uint16) if batch.generations is None else batch.generations
            for batch in self.batches
        ]
        return found[0] if len(found) == 1 else np.concatenate(found)

    @property
    def payload_bytes(self) -> int:
        """Bytes that the payloads take."""
        return sum(len(batch.payload) for batch in self.batches)

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Payload lengths, int64, shape (n,)."""
        lengths: npt.NDArray[np.int64] = self.rows["length"].astype(np.int64)
        return lengths

    @cached_property
    def longest(self) -> int:
        """The length of the longest payload."""
        return int(self.lengths.max(initial=0))

    @cached_property
    def words(self) -> Words:
        """Rows as five numbers each, uint32, shape (n, 5): length and, above it, port; then the address. A view."""
        return np.ascontiguousarray(self.rows).view("<u4").reshape(len(self), -1)

    @cached_property
    def ipv4(self) -> Mask:
        """Rows whose source is an IPv4 address, bool, shape (n,)."""
        mapped: Mask = self.words[:, 3] == MAPPED
        mapped &= (self.words[:, 1] | self.words[:, 2]) == 0
        return mapped

    @cached_property
    def all_ipv4(self) -> bool:
        """Return whether every source is an IPv4 address."""
        if len(self.rows) <= FEW_ROWS:
            packed = self.packed
            return {packed[at : at + 12] for at in range(4, len(packed), ROW.itemsize)} <= {V4_MAPPED}
        return bool(self.ipv4.all())

    @cached_property
    def pointers(self) -> npt.NDArray[np.int64]:
        """Memory address of each payload, int64, shape (n,): valid as long as this object lives."""
        if any(batch.stride for batch in self.batches):
            return np.concatenate([batch.offsets[:-1] + _start(batch) for batch in self.batches])
        offsets = np.cumsum(self.lengths) - self.lengths
        if len(self.batches) == 1:
            return offsets + _start(self.batches[0])
        before = accumulate([len(batch.payload) for batch in self.batches], initial=0)
        starts = [_start(batch) - size for batch, size in zip(self.batches, before, strict=False)]
        offsets += np.repeat(np.array(starts, np.int64), [len(batch) for batch in self.batches])
        return offsets

    @property
    def places(self) -> list[int]:
        """The pointers as plain numbers: where rows are few these are quicker."""
        places: list[int] = []
        for each in self.batches:
            at = _start(each)
            if each.stride:
                places += range(at, at + each.stride * len(each), each.stride)
                continue
            for length in each.length_list:
                places.append(at)
                at += length
        return places

    def payloads(self, rows: Indices) -> Iterator[bytes]:
        """Yield copies of some payloads."""
        for pointer, length in zip(self.pointers[rows].tolist(), self.lengths[rows].tolist(), strict=True):
            yield ctypes.string_at(pointer, length)


def _start(batch: DatagramBatch) -> int:
    # numpy gives the address of a buffer, but not of an empty one
    return np.frombuffer(batch.payload, np.uint8).__array_interface__["data"][0] if len(batch.payload) else 0
