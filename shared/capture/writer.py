"""Writes batches into a pcapng file: one writev(2) for many datagrams, their payloads taken from where they are."""

import ctypes
import errno
import os
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from shared.capture.few_packets import FEW_PACKETS, packet_parts
from shared.capture.pcapng import Destination, First, Packets, interface_block, packet_heads, section_block
from shared.datagrams.batch import DatagramBatch, Indices
from shared.datagrams.gathered import Gathered
from shared.datagrams.mmsg import IOVEC

MAX_PIECES: Final = os.sysconf("SC_IOV_MAX")
MASK: Final = (1 << 64) - 1
_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.writev.argtypes, _libc.writev.restype = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int], ctypes.c_ssize_t


class CaptureWriter:
    """Writes a section with one interface, such as a stream. OSError of the kernel, after part of a block perhaps.

    The descriptor stays the caller's. It is a file or a pipe, and what is written is at once with the kernel.
    """

    def __init__(self, descriptor: int, interface: str, destination: Destination) -> None:
        self._descriptor, self._destination = descriptor, destination
        write_all(descriptor, section_block("fanwire") + interface_block(interface))

    def write(self, batch: DatagramBatch, rows: Indices | None = None, destination: Destination | None = None) -> None:
        """Write these rows of a batch in their order, by default all, at a destination other than the usual one."""
        destination = destination or self._destination
        if (len(batch) if rows is None else len(rows)) > FEW_PACKETS:
            PacketPieces(Packets(Gathered([batch]), rows), destination).append_to(self._descriptor)
            return
        columns = (batch.rows if rows is None else batch.rows[rows]).tobytes()
        write_all(self._descriptor, b"".join(packet_parts(columns, batch.packed(rows), batch.received_ns, destination)))


def write_all(descriptor: int, data: bytes) -> None:
    """Write data to their end. OSError of the kernel, after part of it perhaps."""
    left = memoryview(data)
    while left:
        left = left[os.write(descriptor, left) :]


class PacketPieces:
    """The memory that packets are written from: headers made for them, and their payloads where they are."""

    def __init__(self, packets: Packets, destination: Destination, firsts: Sequence[First] = ()) -> None:
        lines, begins, ends = packet_heads(packets, destination, firsts)
        self._pieces = pieces = np.empty((2 * len(lines) - 1, 2), np.int64)  # pairs of address and size
        pieces[::2, 0] = np.arange(_address(lines), _address(lines) + lines.nbytes, lines.strides[0])
        pieces[::2, 0] += begins
        pieces[::2, 1] = ends - begins
        pieces[1::2, 0], pieces[1::2, 1] = packets.payloads, packets.lengths
        joined = b"".join([first.start for first in firsts])
        at = _address(np.frombuffer(joined, np.uint8)) if joined else 0
        for row, start, _ in firsts:
            pieces[2 * row + 1, 0], pieces[2 * row + 1, 1] = at, len(start)
            at += len(start)
        self._kept_alive = packets, lines, joined

    def append_to(self, descriptor: int) -> None:
        """Write all. OSError of the kernel, after part of it perhaps."""
        _write_pieces(descriptor, self._pieces.view(IOVEC)[:, 0])


def _address(array: npt.NDArray[np.generic]) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


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
