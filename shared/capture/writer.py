"""Writes batches into a pcapng file: one writev(2) for many datagrams, their payloads taken from where they are."""

import ctypes
import errno
import os
from typing import Final

import numpy as np
import numpy.typing as npt

from shared.capture.pcapng import PAD, Destination, interface_block, packet_heads, section_block
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

    def write(self, batch: DatagramBatch, rows: Indices | None = None, destination: Destination | None = None) -> None:
        """Write these rows of a batch in their order, by default all, at a destination other than the usual one."""
        rows = np.arange(len(batch)) if rows is None else rows
        written = PacketPieces(batch, rows, destination or self._destination)
        written.append_to(self._descriptor)


class PacketPieces:
    """The memory that rows of a batch are written from: headers made for them, and their payloads where they are.

    `options` go into the block of the first packet. The batch has to live as long as this object.
    """

    def __init__(self, batch: DatagramBatch, rows: Indices, destination: Destination, options: bytes = b"") -> None:
        lines, begins, ends = packet_heads(batch, rows, destination, len(options))
        payload = np.frombuffer(batch.payload, np.uint8) if len(batch.payload) else np.empty(0, np.uint8)
        self._kept_alive = lines, payload, options
        self._pieces = np.zeros(2 * len(rows) + 1, IOVEC)
        self._fill(self._pieces, batch, rows, begins, ends)
        if options:  # behind the first payload and its padding, before the rest of the second line
            padding = self._pieces[2:3].copy()
            padding["len"] = PAD - begins[1]
            self._pieces["base"][2] += padding["len"][0]
            self._pieces["len"][2] -= padding["len"][0]
            option = np.array([(np.frombuffer(options, np.uint8).ctypes.data, len(options))], IOVEC)
            self._pieces = np.concatenate([self._pieces[:2], padding, option, self._pieces[2:]])

    def _fill(
        self,
        pieces: npt.NDArray[np.void],
        batch: DatagramBatch,
        rows: Indices,
        begins: npt.NDArray[np.int64],
        ends: npt.NDArray[np.int64],
    ) -> None:
        lines, payload, _ = self._kept_alive
        pieces["base"][::2] = addresses_of(lines, lines.strides[0], len(lines)) + begins.astype(np.uint64)
        pieces["len"][::2] = ends - begins
        pieces["base"][1::2] = payload.ctypes.data + batch.offsets[rows].astype(np.uint64)
        pieces["len"][1::2] = batch.lengths[rows]

    @property
    def size(self) -> int:
        """Bytes of all pieces together."""
        return int(self._pieces["len"].sum())

    def append_to(self, descriptor: int) -> None:
        """Write all. OSError of the kernel, after part of it perhaps."""
        _write_pieces(descriptor, self._pieces)


def _write_pieces(descriptor: int, pieces: npt.NDArray[np.void]) -> None:
    """Do as writev(2) does, until all is written. OSError of the kernel, after part of it perhaps."""
    at = 0
    while at < len(pieces):
        some = pieces[at : at + MAX_PIECES]
        written = int(_libc.writev(descriptor, some.ctypes.data, len(some)))
        if written < 0:
            if (number := ctypes.get_errno()) == errno.EINTR:
                continue
            raise OSError(number, os.strerror(number))
        ends = np.cumsum(some["len"])
        done = int(np.searchsorted(ends, written, "right"))
        at += done
        if done < len(some):  # a pipe may take part of a piece, and so does a disk that becomes full
            taken = written - (int(ends[done - 1]) if done else 0)
            some["base"][done] += taken
            some["len"][done] -= taken
