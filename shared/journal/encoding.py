"""Batches as the bytes of records. Those that wait together are encoded together: a batch costs little, rows cost most.

The bytes are the same as one by one.
"""

import struct
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Final

import numpy as np

from shared.capture.few_packets import FEW_PACKETS, captured_lengths, packet_parts
from shared.capture.pcapng import (
    BLOCK_HEAD,
    CUSTOM_BYTES,
    END_OF_OPTIONS,
    HEADERS6,
    TRAILER,
    Destination,
    First,
    Packets,
    make_option,
)
from shared.capture.writer import PacketPieces, write_all
from shared.datagrams.batch import DatagramBatch
from shared.datagrams.gathered import Gathered, Mask
from shared.datagrams.limits import MAX_PAYLOAD, ROW_SIZE
from shared.journal.records import (
    ALL_FOUR,
    ALL_SIX,
    CRC_AT,
    ENTERPRISE,
    FIXED,
    MAGIC,
    MIXED,
    OPTION_HEAD,
    Identity,
    checksum,
)

Numbered = tuple[Identity, DatagramBatch]


def cut(identity: Identity, batch: DatagramBatch) -> Iterator[Numbered]:
    """Yield a batch as one or more that a record and a bus message may have: what is lent whole may be larger."""
    total = identity.total
    for part in batch.parts(MAX_PAYLOAD):
        yield identity._replace(total=total), part
        total += len(part)


class Records:
    """Batches of one stream ready to be written: a record each, `sizes` bytes long."""

    def __init__(self, some: Sequence[Numbered], began_ns: int, destination: Destination) -> None:
        packed = [(identity, _packed(batch)) for identity, batch in some]
        self.sizes: list[int] = []
        if sum([len(batch) for _, batch in some]) <= FEW_PACKETS:
            self._data: bytes | PacketPieces = self._encode_few(packed, began_ns, destination)
        else:
            self._data = self._encode_many(packed, began_ns, destination)

    def _encode_few(self, some: Sequence[Numbered], began_ns: int, destination: Destination) -> bytes:
        parts: list[bytes | memoryview] = []
        for identity, batch in some:
            rows, lengths = batch.rows.tobytes(), batch.length_list
            captured = captured_lengths(rows)
            six = [total == length + HEADERS6 for total, length in zip(captured, lengths, strict=True)]
            families = _families(np.array(six) if any(six) else None)
            column = struct.pack(f"<{len(lengths)}H", *lengths)
            padded = sum([total + 3 & ~3 for total in captured])
            options = self._add(identity, batch, (rows, column, *families), (padded, captured[0]), began_ns)
            parts += packet_parts(rows, batch.payload, batch.received_ns, destination, options)
        return b"".join(parts)

    def _encode_many(self, some: Sequence[Numbered], began_ns: int, destination: Destination) -> PacketPieces:
        packets = Packets(Gathered([batch for _, batch in some]))
        rows, lengths, six = packets.gathered.packed, packets.lengths.astype("<u2").tobytes(), packets.six
        starts = [0, *accumulate([len(batch) for _, batch in some])]
        padded = np.add.reduceat(packets.padded, starts[:-1]).tolist()
        firsts = []
        for (identity, batch), size, start, stop in zip(some, padded, starts, starts[1:], strict=False):
            families = _families(None if six is None else six[start:stop])
            columns = rows[ROW_SIZE * start : ROW_SIZE * stop], lengths[2 * start : 2 * stop], *families
            captured = int(packets.captured[start])
            options = self._add(identity, batch, columns, (size, captured), began_ns)
            payload = bytes(batch.payload[: int(packets.lengths[start])])
            firsts.append(First(start, payload + bytes(-captured & 3) + options, len(options)))
        return PacketPieces(packets, destination, firsts)

    def _add(
        self,
        identity: Identity,
        batch: DatagramBatch,
        columns: tuple[bytes, bytes, int, bytes],
        sizes: tuple[int, int],
        began_ns: int,
    ) -> bytes:
        """Return the options of a record's first block, and note its size.

        `columns` are rows, lengths, and families as `_families` returns them; `sizes` those of all packets with their
        padding, and of the first without it.
        """
        rows, lengths, families, bits = columns
        padded, captured = sizes
        worker, stream = identity.worker.encode(), batch.stream.encode()
        rest = worker + stream + lengths + bits
        data_size = FIXED.size + len(rest)
        size = padded + len(batch) * (BLOCK_HEAD + TRAILER) + OPTION_HEAD + data_size + -data_size % 4 + 4
        option_at = BLOCK_HEAD + captured + -captured % 4 + OPTION_HEAD
        numbers = began_ns, batch.received_ns, identity.boot, identity.sequence, identity.total
        names = len(worker), len(stream)
        data = FIXED.pack(MAGIC, 0, size, option_at, len(batch), families, *numbers, *names) + rest
        crc = checksum(data, rows, batch.payload).to_bytes(4, "little")
        self.sizes.append(size)
        return make_option(CUSTOM_BYTES, ENTERPRISE + data[:CRC_AT] + crc + data[CRC_AT + 4 :]) + _END

    def append_to(self, descriptor: int) -> None:
        """Write them with one system call, or several for over 500 rows. OSError, after part of it perhaps."""
        if isinstance(self._data, bytes):
            write_all(descriptor, self._data)
        else:
            self._data.append_to(descriptor)


_END: Final = make_option(END_OF_OPTIONS)


def _packed(batch: DatagramBatch) -> DatagramBatch:
    """Return the batch with its payloads end to end; itself where they are."""
    if not batch.stride:
        return batch
    return DatagramBatch(batch.stream, batch.received_ns, batch.rows, batch.packed())


def _families(six: Mask | None) -> tuple[int, bytes]:
    """Return the families of a record's rows, and where they are mixed a bit for each row."""
    if six is None or not six.any():
        return ALL_FOUR, b""
    return (ALL_SIX, b"") if six.all() else (MIXED, np.packbits(six).tobytes())
