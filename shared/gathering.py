"""Batches of one stream that wait together, handled as one: what a step costs once is shared by more rows.

Under load a service finds many batches waiting, and the cost of planning is one of array operations, hardly of rows.
Nothing is copied but the 20 bytes a row: payloads stay where ZeroMQ received them.
"""

import ctypes
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Final

import numpy as np
import numpy.typing as npt

from shared.batch import MAX_ROWS, DatagramBatch, Indices, Rows

MAX_GATHERED: Final = 8 * MAX_ROWS
"""Rows; more saves nothing that can be measured, and delays the first of them."""
MAX_GATHERED_PAYLOAD: Final = 4 << 20
"""Bytes after which no further batch is taken along."""


class Gathered:
    """Datagrams of one stream, in the order they came; `rows` has dtype `ROW`, shape (n,)."""

    def __init__(self, batches: Sequence[DatagramBatch]) -> None:
        self.stream = batches[0].stream
        self.batches = tuple(batches)
        self.rows: Rows = batches[0].rows if len(batches) == 1 else np.concatenate([each.rows for each in batches])

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def payload_bytes(self) -> int:
        """How much memory the payloads take."""
        return sum(len(batch.payload) for batch in self.batches)

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Payload lengths, int64, shape (n,)."""
        lengths = [batch.lengths for batch in self.batches]
        return lengths[0] if len(lengths) == 1 else np.concatenate(lengths)

    @cached_property
    def pointers(self) -> npt.NDArray[np.int64]:
        """Where in memory each payload begins, int64, shape (n,): good as long as this lives."""
        if len(self.batches) == 1:
            return _pointers(self.batches[0])
        return np.concatenate([_pointers(batch) for batch in self.batches])

    def payloads(self, rows: Indices) -> Iterator[bytes]:
        """Yield copies of some payloads."""
        for pointer, length in zip(self.pointers[rows].tolist(), self.lengths[rows].tolist(), strict=True):
            yield ctypes.string_at(pointer, length)


def _pointers(batch: DatagramBatch) -> npt.NDArray[np.int64]:
    # numpy tells where a buffer is, but not of an empty one
    start = np.frombuffer(batch.payload, np.uint8).ctypes.data if len(batch.payload) else 0
    return batch.offsets[:-1] + start
