"""Writes batches into a pcapng file: one writev(2) for many datagrams, their payloads taken from where they are."""

import ctypes
import errno
import os
from typing import Final

import numpy as np
import numpy.typing as npt

from shared.capture.pcapng import PAD, Destination, interface_block, packet_heads, section_block
from shared.datagrams.batch import DatagramBatch, Indices
from shared.datagrams.mmsg import IOVEC

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
        if len(batch) and (rows is None or len(rows)):
            PacketPieces(batch, rows, destination or self._destination).append_to(self._descriptor)


class PacketPieces:
    """The memory that rows of a batch are written from: headers made for them, and their payloads where they are.

    `options` go into the block of the first packet. The batch has to live as long as this object.
    """

    def __init__(
        self, batch: DatagramBatch, rows: Indices | None, destination: Destination, options: bytes = b""
    ) -> None:
        lines, begins, ends = packet_heads(batch, rows, destination, len(options))
        payload = np.frombuffer(batch.payload, np.uint8) if len(batch.payload) else np.empty(0, np.uint8)
        option = np.frombuffer(options, np.uint8) if options else None
        self._kept_alive = lines, payload, options
        ahead = 2 if option is not None else 0
        # Pairs of address and size; with options two more, behind the first payload and its padding.
        self._pieces = np.empty((2 * len(lines) - 1 + ahead, 2), np.uint64)
        pieces, offsets, lengths = self._pieces[ahead:], batch.offsets[:-1], batch.lengths
        if rows is not None:
            offsets, lengths = offsets[rows], lengths[rows]
        pieces[::2, 0] = np.arange(len(lines)) * lines.strides[0] + lines.ctypes.data + begins
        pieces[::2, 1] = ends - begins
        pieces[1::2, 0], pieces[1::2, 1] = offsets + payload.ctypes.data, lengths
        if option is not None:
            padding = PAD - int(begins[1])
            self._pieces[:2] = pieces[:2]
            self._pieces[2] = pieces[2, 0], padding
            self._pieces[3] = option.ctypes.data, len(option)
            self._pieces[4] = pieces[2, 0] + np.uint64(padding), pieces[2, 1] - np.uint64(padding)

    def append_to(self, descriptor: int) -> None:
        """Write all. OSError of the kernel, after part of it perhaps."""
        _write_pieces(descriptor, self._pieces.view(IOVEC)[:, 0])


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
        if written == int(some["len"].sum()):
            at += len(some)
            continue
        ends = np.cumsum(some["len"])
        done = int(np.searchsorted(ends, written, "right"))
        at += done
        if done < len(some):  # a pipe may take part of a piece, and so does a disk that becomes full
            taken = written - (int(ends[done - 1]) if done else 0)
            some["base"][done] += taken
            some["len"][done] -= taken
