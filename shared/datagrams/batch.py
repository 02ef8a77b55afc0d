"""The datagrams of one receive call as columns: the unit that everything between processes works on.

Invariants, checked by `check` where a batch comes from outside:
- at most `MAX_ROWS` rows, each at most `MAX_DATAGRAM` bytes;
- the payloads stand in one buffer in the order received: end to end, with nothing else in it; or, where there is a
`stride`, each at a multiple of it, with anything in between;
- a row keeps the address and port that the kernel reported: nothing downstream may change them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
import numpy.typing as npt

from shared.datagrams.limits import MAX_DATAGRAM, MAX_ROWS, ROW_SIZE
from shared.net.addresses import V4_MAPPED, unpack_address

FEW_ROWS: Final = 64
"""Lengths of so few are sooner summed up as plain numbers."""
ROW: Final = np.dtype([("length", "<u2"), ("port", "<u2"), ("address", "u1", (16,))])
"""One datagram's columns, 20 bytes: payload length, source port, source address (IPv4 mapped into IPv6)."""
assert ROW.itemsize == ROW_SIZE

MAPPED: Final = int.from_bytes(V4_MAPPED[8:], "little")
"""The third word of an IPv4 address mapped into IPv6; the two before it are 0."""
Rows = npt.NDArray[np.void]
Indices = npt.NDArray[np.intp]
Generations = npt.NDArray[np.uint16]


@dataclass(eq=False)
class DatagramBatch:
    """Datagrams of one stream, received together by one worker.

    `rows` has dtype `ROW`, shape (n,), and may be a read-only view of a received part. `payload` is any C-contiguous
    buffer; the batch keeps it alive. `received_ns` is the wall clock at the receive call, in nanoseconds.
    `generations`, shape (n,), tells by which set of rules the kernel has copied each row already, 0: by none; where
    there is no such array it has copied none.
    """

    stream: str
    received_ns: int
    rows: Rows
    payload: bytes | memoryview
    stride: int = 0
    generations: Generations | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Payload lengths, int64, shape (n,): wide enough to sum."""
        return self.rows["length"].astype(np.int64)

    @cached_property
    def length_list(self) -> list[int]:
        """Payload lengths as plain numbers: where rows are few these are quicker."""
        lengths: list[int] = self.rows["length"].tolist()
        return lengths

    @cached_property
    def offsets(self) -> npt.NDArray[np.int64]:
        """Start of each payload, int64, shape (n + 1,); the last is the end of the buffer."""
        if self.stride:
            return np.arange(len(self.rows) + 1) * self.stride
        offsets = np.zeros(len(self.rows) + 1, np.int64)
        np.cumsum(self.lengths, out=offsets[1:])
        return offsets

    @cached_property
    def words(self) -> npt.NDArray[np.uint32]:
        """Rows as five numbers each, uint32, shape (n, 5): length and, above it, port; then the address. A view."""
        return np.ascontiguousarray(self.rows).view("<u4").reshape(len(self.rows), -1)

    @cached_property
    def all_ipv4(self) -> bool:
        """Return whether every source is an IPv4 address."""
        words = self.words
        return bool(((words[:, 3] == MAPPED) & ((words[:, 1] | words[:, 2]) == 0)).all())

    def packed(self, rows: Indices | None = None) -> bytes:
        """Return a copy of the payloads of these rows, by default of all, end to end."""
        if rows is not None:
            starts, lengths = self.offsets[:-1][rows].tolist(), self.lengths[rows].tolist()
        elif not self.stride:
            return bytes(self.payload)
        elif len(self) and self.length_list.count(length := self.length_list[0]) == len(self):
            if length == self.stride:
                return bytes(self.payload)
            shape, strides = (len(self), length), (self.stride, 1)
            return np.ndarray(shape, np.uint8, self.payload, 0, strides).tobytes()  # much faster than one by one
        else:
            starts, lengths = [*range(0, len(self) * self.stride, self.stride)], self.length_list
        payload = memoryview(self.payload)
        return b"".join([payload[at : at + size] for at, size in zip(starts, lengths, strict=True)])

    def part(self, first: int, stop: int) -> "DatagramBatch":
        """Return the rows from `first` up to `stop`, as views of these."""
        if first == 0 and stop == len(self.rows):
            return self
        payload = memoryview(self.payload)[int(self.offsets[first]) : int(self.offsets[stop])]
        marks = None if self.generations is None else self.generations[first:stop]
        return DatagramBatch(self.stream, self.received_ns, self.rows[first:stop], payload, self.stride, marks)

    def parts(self, most: int) -> Iterator["DatagramBatch"]:
        """Yield the rows in order, as batches of at most `MAX_ROWS` rows and `most` bytes of payload each.

        A longer datagram goes alone.
        """
        if len(self.payload) <= most and len(self) <= MAX_ROWS:
            yield self
            return
        ends = np.cumsum(self.lengths)
        start = before = 0
        while start < len(self):
            stop = min(start + MAX_ROWS, max(start + 1, int(np.searchsorted(ends, before + most, "right"))))
            yield self.part(start, stop)
            start, before = stop, int(ends[stop - 1])

    def check(self) -> None:
        """Raise ValueError when an invariant does not hold."""
        count = len(self.rows)
        if count > MAX_ROWS:
            raise ValueError(f"{count} rows, more than {MAX_ROWS}")
        if count <= FEW_ROWS:
            lengths = self.length_list
            longest, total = max(lengths, default=0), sum(lengths)
        else:
            column = self.rows["length"]
            longest, total = int(np.maximum.reduce(column)), int(np.add.reduce(column, dtype=np.int64))
        if longest > MAX_DATAGRAM:
            raise ValueError(f"a datagram of {longest} bytes, more than {MAX_DATAGRAM}")
        size, end = len(self.payload), count * self.stride or total
        if end != size:
            raise ValueError(f"lengths add up to {end}, the payload has {size} bytes")
        if self.stride and longest > self.stride:
            raise ValueError(f"a datagram of {longest} bytes, they begin every {self.stride}")

    def datagrams(self) -> Iterator[tuple[str, int, bytes]]:
        """Yield (source address, source port, payload) a row: for people and files, not for the hot path."""
        payload, offsets = memoryview(self.payload), self.offsets.tolist()
        for index, row in enumerate(self.rows):
            source = unpack_address(row["address"].tobytes())
            yield source, int(row["port"]), bytes(payload[offsets[index] : offsets[index] + int(row["length"])])


def make_rows(lengths: npt.ArrayLike, addresses: npt.NDArray[np.uint8] | list[bytes], ports: npt.ArrayLike) -> Rows:
    """Build the `ROW` array of n datagrams from lengths (n,), 16-byte addresses (n, 16) or n packed, and ports (n,)."""
    lengths = np.asarray(lengths)
    rows = np.empty(len(lengths), ROW)
    rows["length"], rows["port"] = lengths, ports
    packed = addresses if isinstance(addresses, np.ndarray) else np.frombuffer(b"".join(addresses), np.uint8)
    rows["address"] = packed.reshape(-1, 16)
    return rows


def read_generations(count: int, same: int, column: bytes) -> Generations | None:
    """Return the generation of each of `count` rows: all the `same`, or two bytes each in `column`; None: all are 0.

    ValueError when the column has another length.
    """
    if column:
        found = np.frombuffer(column, "<u2")
        if len(found) != count:
            raise ValueError(f"{len(found)} generations for {count} datagrams")
        return found
    return np.full(count, same, np.uint16) if same else None


def read_rows(part: bytes | memoryview) -> Rows:
    """Return the rows in a part of a message, as a read-only view of it; ValueError when it holds part of a row."""
    return np.frombuffer(part, ROW)
