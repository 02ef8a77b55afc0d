"""Datagrams that commands write as a capture, for tshark and its like. It loads numpy; `output` does not."""

import time
from collections.abc import Iterable
from itertools import islice
from typing import BinaryIO

import numpy as np

from shared.capture.pcapng import UNKNOWN4, UNKNOWN6, Destination
from shared.capture.writer import CaptureWriter
from shared.datagrams.batch import DatagramBatch, Indices, make_rows
from shared.net.addresses import pack_address


def destination_at(*places: tuple[str, int]) -> Destination:
    """Return the destination of datagrams that came to these addresses; an unspecified one stays unknown."""
    four = [_pack(address) for address, _ in places if ":" not in address]
    six = [_pack(address) for address, _ in places if ":" in address]
    return Destination(places[0][1] if places else 0, *four[:1] or [UNKNOWN4], *six[:1] or [UNKNOWN6])


def _pack(address: str) -> bytes:
    return pack_address(address.partition("%")[0])  # headers have no room for a scope


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
            rows = make_rows([len(each) for each in payloads], [*map(_pack, addresses)], ports)
            self.write_rows(DatagramBatch(self._interface, time.time_ns(), rows, b"".join(payloads)))

    def write_rows(self, batch: DatagramBatch, rows: Indices | None = None) -> None:
        """Write these rows of a batch, by default all."""
        if self._count is not None:
            rows = (np.arange(len(batch)) if rows is None else rows)[: self._count - self.written]
        self._writer.write(batch, rows)
        self.written += len(batch) if rows is None else len(rows)
