"""Datagrams that commands write as a capture, for tshark and its like. It loads numpy; `output` does not."""

import time
from collections.abc import Iterable
from itertools import islice
from typing import BinaryIO

import numpy as np

from shared.capture.destination import pack_unscoped
from shared.capture.pcapng import Destination
from shared.capture.writer import CaptureWriter
from shared.datagrams.batch import DatagramBatch, Indices, make_rows


class CaptureOutput:
    """Writes datagrams with their sources and times, at most `count` if it is given."""

    def __init__(self, file: BinaryIO, interface: str, destination: Destination, count: int | None) -> None:
        self._writer = CaptureWriter(file.fileno(), interface, destination)
        self._interface = interface
        self._count = count
        self.written = 0

    @property
    def full(self) -> bool:
        """Return whether the wanted number was written."""
        return self._count is not None and self.written >= self._count

    def write(self, datagrams: Iterable[tuple[str, int, bytes]]) -> None:
        """Write datagrams that have come now."""
        some = list(islice(datagrams, None if self._count is None else self._count - self.written))
        if some:
            addresses, ports, payloads = zip(*some, strict=True)
            rows = make_rows([len(each) for each in payloads], [*map(pack_unscoped, addresses)], ports)
            self.write_rows(DatagramBatch(self._interface, time.time_ns(), rows, b"".join(payloads)))

    def write_rows(self, batch: DatagramBatch, rows: Indices | None = None) -> None:
        """Write these rows of a batch, by default all."""
        if self._count is not None:
            rows = (np.arange(len(batch)) if rows is None else rows)[: self._count - self.written]
        self._writer.write(batch, rows)
        self.written += len(batch) if rows is None else len(rows)
