"""recvmmsg(2) and sendmmsg(2) on stdlib sockets: many datagrams a system call, their columns as numpy arrays.

The kernel's structures are numpy dtypes, so filling in a whole vector is a few array operations. Layouts are those of
64-bit Linux (x86-64, aarch64); the sizes are asserted.
"""

import ctypes
import errno
import mmap
import os
import socket
import struct
from typing import Final

import numpy as np
import numpy.typing as npt

from shared.datagrams.batch import ROW, Rows
from shared.datagrams.limits import MAX_DATAGRAM, MAX_ROWS
from shared.log import get_logger
from shared.net.addresses import V4_MAPPED

IOVEC: Final = np.dtype([("base", "u8"), ("len", "u8")])
MMSGHDR: Final = np.dtype(
    [
        ("name", "u8"),
        ("namelen", "u4"),
        ("_pad0", "u4"),
        ("iov", "u8"),
        ("iovlen", "u8"),
        ("control", "u8"),
        ("controllen", "u8"),
        ("flags", "i4"),
        ("_pad1", "u4"),
        ("len", "u4"),
        ("_pad2", "u4"),
    ]
)
SOCKADDR: Final = np.dtype(
    {
        "names": ["family", "port", "v4", "v6"],
        "formats": ["u2", ">u2", ("u1", 4), ("u1", 16)],
        "offsets": [0, 2, 4, 8],
        "itemsize": 28,
    }
)
"""struct sockaddr_in and sockaddr_in6 in one: family and port stand at the same place in both."""
CONTROL: Final = np.dtype([("len", "u8"), ("level", "i4"), ("type", "i4"), ("value", "u4"), ("_pad", "u1", 4)])
"""struct cmsghdr with the number that UDP_GRO and SO_RCVMARK bring, padded as CMSG_SPACE does."""
UDP_GRO: Final = 104
SO_MARK: Final = 36
"""Type of the control message that SO_RCVMARK brings, in front of that of UDP_GRO."""
assert ctypes.sizeof(ctypes.c_void_p) == 8, "fanwire needs a 64-bit Linux"
assert (IOVEC.itemsize, MMSGHDR.itemsize, SOCKADDR.itemsize) == (16, 64, 28)

REFUSED: Final = (errno.ENOSYS, errno.EPERM)
"""Errnos of a call that seccomp(2) refuses; recvmmsg(2) itself returns neither."""
SLOT: Final = 65_536
"""Bytes a datagram may take in the arena: more than UDP can carry, so none is ever cut."""

_NAME4: Final = struct.Struct("!2xH4s20x")
_NAME6: Final = struct.Struct("!2xH4x16s4x")
_ROW: Final = struct.Struct("<HH16s")
"""SOCKADDR and ROW for those that are handled one by one."""

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.recvmmsg.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_int, ctypes.c_void_p]
_libc.sendmmsg.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_int]
for _one in (_libc.recvmsg, _libc.sendmsg):
    _one.argtypes, _one.restype = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int], ctypes.c_ssize_t

_refused: list[str] = []
"""Calls already logged as refused."""
log = get_logger()


def addresses_of(array: npt.NDArray[np.generic], stride: int, count: int) -> npt.NDArray[np.uint64]:
    """Memory addresses of `count` items, `stride` bytes apart, from the beginning of `array`."""
    return np.arange(count, dtype=np.uint64) * np.uint64(stride) + np.uint64(array.ctypes.data)


class ReceiveArena:
    """Memory that up to `MAX_ROWS` datagrams of any size are received into, one 64 KiB slot each.

    One arena serves all sockets of a process: what `receive` brought stays until the next call. The slots are
    anonymous memory that costs nothing until a datagram of that size comes.
    """

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, MAX_ROWS * SLOT)
        self._bytes = memoryview(self._memory)
        self._slots = np.frombuffer(self._memory, np.uint8).reshape(MAX_ROWS, SLOT)
        self._starts = list(range(0, MAX_ROWS * SLOT, SLOT))
        self.names = np.zeros(MAX_ROWS, SOCKADDR)
        slots = addresses_of(self._slots, SLOT, MAX_ROWS)
        self._names_as_bytes = self.names.view(np.uint8).reshape(-1).data
        self._whole, self._single = self._vector(1)
        self._numbers = self._whole.view(np.uint32).reshape(-1).data
        self._name_sizes = np.full(MAX_ROWS, SOCKADDR.itemsize, np.uint32).data
        self._split, self._pieces = self._vector(2)
        self._controls = np.zeros((MAX_ROWS, 2), CONTROL)
        for headers in (self._whole, self._split):
            headers["control"] = addresses_of(self._controls, 2 * CONTROL.itemsize, MAX_ROWS)
        self._marks = False
        self._at = {id(headers): headers.ctypes.data for headers in (self._whole, self._split)}
        for pieces in (self._single, self._pieces):
            pieces["base"][:, -1], pieces["len"][:, -1] = slots, SLOT
        self._number = np.arange(MAX_ROWS, dtype=np.uint64)
        self.headers = self._whole
        self._place: memoryview | None = None
        self._stride = self._count = 0
        self._joined: bytes | None = None
        self._one_by_one = False

    def _vector(self, pieces: int) -> tuple[npt.NDArray[np.void], npt.NDArray[np.void]]:
        """Return headers for this many pieces of memory a datagram, and the pieces, shape (MAX_ROWS, pieces)."""
        iovecs, headers = np.zeros((MAX_ROWS, pieces), IOVEC), np.zeros(MAX_ROWS, MMSGHDR)
        headers["name"], headers["namelen"] = addresses_of(self.names, SOCKADDR.itemsize, MAX_ROWS), SOCKADDR.itemsize
        headers["iov"], headers["iovlen"] = addresses_of(iovecs, pieces * IOVEC.itemsize, MAX_ROWS), pieces
        return headers, iovecs

    def receive(
        self,
        descriptor: int,
        place: memoryview | None = None,
        stride: int = 0,
        *,
        trains: int = 0,
        marks: bool = False,
    ) -> int:
        """Receive what is there, at most `MAX_ROWS` datagrams, without waiting; return their number.

        OSError of the kernel.

        With a `place` the first `stride` bytes of each datagram go there, one datagram every `stride` bytes, and only
        the bytes beyond them go into its slot: datagrams that are no longer need not be moved afterwards.
        With `trains`, at most so many pieces are received, and `segments` tells which of them are several datagrams.
        With `marks` the socket brings them (SO_RCVMARK), for `marks`.
        """
        self._place, self._stride, self._joined, self._marks = place, stride, None, marks
        self.headers, most = self._whole, MAX_ROWS
        if place is not None:
            self.headers, most = self._split, min(MAX_ROWS, len(place) // stride)
            start = np.uint64(np.frombuffer(place, np.uint8).ctypes.data)
            self._pieces["base"][:, 0], self._pieces["len"][:, 0] = self._number * np.uint64(stride) + start, stride
        if trains:
            most = min(most, trains)
        if trains or marks:
            self.headers["controllen"][:most] = (bool(trains) + marks) * CONTROL.itemsize
        self._count = count = self._receive(descriptor, most)
        if count >= 0:
            return count
        number = ctypes.get_errno()
        if number == errno.EAGAIN:
            return 0
        raise OSError(number, os.strerror(number))

    def _receive(self, descriptor: int, most: int) -> int:
        """Do as recvmmsg(2) does; where a sandbox refuses that, call recvmsg(2) for each datagram."""
        at = self._at[id(self.headers)]
        if not self._one_by_one:
            count = int(_libc.recvmmsg(descriptor, at, most, socket.MSG_DONTWAIT, None))
            if count >= 0 or ctypes.get_errno() not in REFUSED:
                return count
        for number in range(most):
            size = _libc.recvmsg(descriptor, at + number * MMSGHDR.itemsize, socket.MSG_DONTWAIT)
            if size < 0 and number == 0 and ctypes.get_errno() != errno.EAGAIN:
                return -1
            if not self._one_by_one:
                self._one_by_one = True
                log.warning("recvmmsg(2) is refused here: receiving datagrams one by one, which is slower")
            if size < 0:
                return number
            self.headers["len"][number] = size
        return most

    def restore(self, count: int) -> None:
        """Undo what the kernel wrote into the first `count` headers; due before the next `receive`."""
        if self.headers is self._whole:
            self._numbers[2 : 16 * count : 16] = self._name_sizes[:count]
        else:
            self.headers["namelen"][:count] = SOCKADDR.itemsize

    def lengths(self, count: int) -> npt.NDArray[np.uint32]:
        """Sizes of the received datagrams, uint32, shape (count,): a view. One of `SLOT` bytes may have been cut."""
        return self.headers["len"][:count]

    def segments(self, count: int) -> npt.NDArray[np.uint32]:
        """Lengths that the received trains are to be cut at, uint32, shape (count,); 0 for a single datagram."""
        return self._told(count, int(self._marks), socket.IPPROTO_UDP, UDP_GRO)[0]

    def marks(self, count: int) -> tuple[npt.NDArray[np.uint32], int]:
        """Return the marks of what was received with `marks`, uint32, shape (count,), and how many were not told."""
        values, told = self._told(count, 0, socket.SOL_SOCKET, SO_MARK)
        return values, count - int(np.count_nonzero(told))

    def _told(
        self, count: int, place: int, level: int, kind: int
    ) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.bool_]]:
        """Return the numbers of the control messages at a place, 0 where another or none is there, and where it is."""
        controls = self._controls[:count, place]
        told = self.headers["controllen"][:count] >= (place + 1) * CONTROL.itemsize - 4
        told &= (controls["level"] == level) & (controls["type"] == kind)
        return np.where(told, controls["value"], np.uint32(0)), told

    def lengths_of_few(self, count: int) -> list[int]:
        """As `lengths`, for a few datagrams that were received without a place."""
        return self._numbers[14 : 16 * count : 16].tolist()

    def rows_of_few(self, lengths: list[int], family: int) -> bytes:
        """As `rows`, of lengths, as bytes."""
        names = self._names_as_bytes[: SOCKADDR.itemsize * len(lengths)]
        if family == socket.AF_INET:
            return b"".join(
                [_ROW.pack(length, port, V4_MAPPED + address)
                 for length, (port, address) in zip(lengths, _NAME4.iter_unpack(names), strict=True)]
            )  # fmt: skip
        return b"".join(
            [_ROW.pack(length, port, address)
             for length, (port, address) in zip(lengths, _NAME6.iter_unpack(names), strict=True)]
        )  # fmt: skip

    def payload_of_few(self, lengths: list[int]) -> bytes:
        """Their payloads, end to end."""
        slots = self._bytes
        return b"".join([slots[at : at + length] for at, length in zip(self._starts, lengths, strict=False)])

    def truncated(self, count: int) -> int:
        """Return the number of datagrams that were cut (MSG_TRUNC) though UDP can carry them: none that fit a slot."""
        flags = self.headers["flags"][:count]
        if not np.bitwise_or.reduce(flags) & socket.MSG_TRUNC:
            return 0
        return int(np.count_nonzero((flags & socket.MSG_TRUNC).astype(bool) & (self.lengths(count) <= MAX_DATAGRAM)))

    def rows(self, count: int, family: int) -> Rows:
        """The columns of the received datagrams, dtype `ROW`, shape (count,): a copy. Sources are zero for AF_UNIX."""
        rows = np.zeros(count, ROW)
        rows["length"] = self.headers["len"][:count]
        if family == socket.AF_INET:
            rows["port"] = self.names["port"][:count]
            rows["address"][:, :12] = np.frombuffer(V4_MAPPED, np.uint8)
            rows["address"][:, 12:] = self.names["v4"][:count]
        elif family == socket.AF_INET6:
            rows["port"] = self.names["port"][:count]
            rows["address"] = self.names["v6"][:count]
        return rows

    def payload(self, start: int, stop: int) -> bytes | memoryview:
        """The payloads of datagrams `start` to `stop`, end to end: a copy."""
        lengths = self.headers["len"][start:stop]
        if self._place is None and (lengths == lengths[0]).all():
            return self._slots[start:stop, : lengths[0]].tobytes()
        if self._joined is None:
            self._joined = b"".join(self._parts())
        before = int(self.headers["len"][:start].sum())
        return memoryview(self._joined)[before : before + int(lengths.sum())]

    def located(self, count: int) -> tuple[bytes | memoryview, int]:
        """Return the buffer with the payloads of all `count` datagrams, and their distance in it, 0 for end to end.

        Nothing is copied unless some did not come to their place. The buffer is good until the next `receive`.
        """
        if self._place is None:
            return self._bytes[: count * SLOT], SLOT
        if int(self.lengths(count).max()) <= self._stride:
            return self._place[: count * self._stride], self._stride
        if self._joined is None:
            self._joined = b"".join(self._parts())
        return self._joined, 0

    def _parts(self) -> list[memoryview]:
        """The pieces of memory that the payloads of all datagrams are in, in their order."""
        place, stride = self._place, self._stride
        slots = zip(self._starts, self.lengths(self._count).tolist(), strict=False)
        if place is None:  # a join over views costs 0.12 µs a datagram; a numpy gather is slower
            return [self._bytes[at : at + size] for at, size in slots]
        parts = []
        for start, (at, size) in zip(range(0, self._count * stride, stride), slots, strict=True):
            parts.append(place[start : start + min(size, stride)])
            parts.append(self._bytes[at : at + max(0, size - stride)])
        return parts


def send(descriptor: int, headers: npt.NDArray[np.void] | int, start: int, stop: int) -> tuple[int, int]:
    """Send messages `start` to `stop` of a `MMSGHDR` array without waiting; return (number taken, errno).

    Instead of the array there may be its memory address, which numpy takes longer to tell than a short call takes.

    The errno is that of the first message when none was taken, else 0: the kernel reports an error in the middle by
    taking fewer.
    """
    at = (headers if isinstance(headers, int) else headers.ctypes.data) + start * MMSGHDR.itemsize
    count = int(_libc.sendmmsg(descriptor, at, stop - start, socket.MSG_DONTWAIT))
    if count < 0 and ctypes.get_errno() == errno.ENOSYS:  # a sandbox refuses it
        if not _refused:
            _refused.append("sendmmsg")
            log.warning("sendmmsg(2) is refused here: sending datagrams one by one, which is slower")
        for count in range(stop - start):
            if _libc.sendmsg(descriptor, at + count * MMSGHDR.itemsize, socket.MSG_DONTWAIT) < 0:
                return count, 0 if count else ctypes.get_errno()
        return stop - start, 0
    return (count, 0) if count > 0 else (0, ctypes.get_errno())
