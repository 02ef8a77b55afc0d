"""Writes batches into a pcapng file: one writev(2) for many datagrams, their payloads taken from where they are."""

import ctypes
import errno
import os
from typing import Final

import numpy as np
import numpy.typing as npt

from shared.capture.pcapng import Destination, interface_block, packet_heads, section_block
from shared.datagrams.batch import DatagramBatch, Indices
from shared.datagrams.mmsg import IOVEC, addresses_of

MAX_PIECES: Final = os.sysconf("SC_IOV_MAX")
_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.writev.argtypes, _libc.writev.restype = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int], ctypes.c_ssize_t


class CaptureWriter:
    """Writes a section with one interface, such as a stream. OSError of the kernel, after part of a block perhaps.

    The descriptor stays the caller's. It is a file or a pipe, and what is written is at once with the kernel.
    """

    def __init__(self, descriptor: int, interface: str, destination: Destination) -> None:
        self._descriptor, self._destination = descriptor, destination
        left = memoryview(section_block("fanwire") + interface_block(interface))
        while left:
            left = left[os.write(descriptor, left) :]

    def write(self, batch: DatagramBatch, rows: Indices | None = None) -> None:
        """Write these rows of a batch in their order, by default all."""
        rows = np.arange(len(batch)) if rows is None else rows
        lines, begins, ends = packet_heads(batch, rows, self._destination)
        pieces = np.zeros(2 * len(rows) + 1, IOVEC)
        pieces["base"][::2] = addresses_of(lines, lines.strides[0], len(lines)) + begins.astype(np.uint64)
        pieces["len"][::2] = ends - begins
        payload = np.frombuffer(batch.payload, np.uint8)
        pieces["base"][1::2] = payload.ctypes.data + batch.offsets[rows].astype(np.uint64)
        pieces["len"][1::2] = batch.lengths[rows]
        self._write_pieces(pieces)

    def _write_pieces(self, pieces: npt.NDArray[np.void]) -> None:
        """Do as writev(2) does, until all is written."""
        at = 0
        while at < len(pieces):
            some = pieces[at : at + MAX_PIECES]
            written = int(_libc.writev(self._descriptor, some.ctypes.data, len(some)))
            if written < 0:
                if (number := ctypes.get_errno()) == errno.EINTR:
                    continue
                raise OSError(number, os.strerror(number))
            ends = np.cumsum(some["len"])
            done = int(np.searchsorted(ends, written, "right"))
            at += done
            if done < len(some):  # a pipe may take part of a piece
                taken = written - (int(ends[done - 1]) if done else 0)
                some["base"][done] += taken
                some["len"][done] -= taken
