"""The socket by which the kernel's tables are changed and read. Its end is the end of the tables that it owns."""

import errno
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from typing import Final

from services.offload.applying.nftables.attributes import number, read, text
from services.offload.applying.nftables.messages import COUNTER, DUMP, FAMILY_HEADER, GET_OBJECT, HEADER, Batch, message

NETLINK_NETFILTER: Final = 12
SO_SNDBUFFORCE: Final = 32
SO_RCVBUFFORCE: Final = 33
SEND_BUFFER: Final = 64 << 20
"""Bytes: a transaction is one message to the kernel, however long."""
RECEIVE_BUFFER: Final = 4 << 20
RECEIVE_SIZE: Final = 1 << 16
ANSWER_SECONDS: Final = 10.0
NLMSG_ERROR: Final = 2
NLMSG_DONE: Final = 3
INTERRUPTED: Final = 0x10
"""NLM_F_DUMP_INTR: the tables were changed while they were read."""
TRIES: Final = 5
ERROR: Final = struct.Struct("=i")

Counters = dict[str, tuple[int, int]]
"""Packets and bytes by a counter's name."""


class Nftables:
    """A connection to nf_tables; it needs CAP_NET_ADMIN, for each message anew."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, NETLINK_NETFILTER)
        self._socket.bind((0, 0))
        self._socket.settimeout(ANSWER_SECONDS)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, SEND_BUFFER)
            self._socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, RECEIVE_BUFFER)
        except PermissionError:  # in a user namespace: the limits of the host hold, and of a plan's size with them
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
        self._sequence = 1

    def commit(self, batch: Batch) -> None:
        """Make the changes of a batch, all or none. OSError that names the first that the kernel refused."""
        if not batch:
            return  # the kernel would answer nothing
        data, about = batch.encode(self._sequence)
        first, last = self._sequence, self._sequence + len(about) - 2
        self._sequence = last + 2
        self._socket.sendto(data, (0, 0))
        while True:
            for kind, _, sequence, body in self._receive():
                if kind != NLMSG_ERROR or not first <= sequence <= last:
                    continue
                code = -ERROR.unpack_from(body)[0]
                if code:
                    self._discard()
                    raise OSError(code, f"{about[sequence - first]}: {os.strerror(code)}")
                if sequence == last:
                    return

    def counters(self, table: str) -> Counters:
        """Return the counters of a table. OSError when they can't be read."""
        for _ in range(TRIES):
            found = self._dump(table)
            if found is not None:
                return found
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    def _dump(self, table: str) -> Counters | None:
        """Return the counters; None when they were changed meanwhile."""
        self._sequence += 1
        wanted, whole = self._sequence, True
        found: Counters = {}
        self._socket.sendto(message(GET_OBJECT, DUMP, wanted, text(1, table) + number(3, COUNTER)), (0, 0))
        while True:
            for kind, flags, sequence, body in self._receive():
                if sequence != wanted:
                    continue
                whole &= not flags & INTERRUPTED
                if kind == NLMSG_DONE:
                    return found if whole else None
                if kind == NLMSG_ERROR:
                    code = -ERROR.unpack_from(body)[0]
                    if code == errno.EINTR:
                        return None
                    raise OSError(code, os.strerror(code))
                name, count = _counter(body[FAMILY_HEADER.size :])
                found[name] = count

    def _receive(self) -> Iterator[tuple[int, int, int, bytes]]:
        """Yield type, flags, sequence and body of each message that the kernel has sent next."""
        data, (sender, _) = self._socket.recvfrom(RECEIVE_SIZE)
        if sender:
            return  # of a process, which CAP_NET_ADMIN lets send to us
        at = 0
        while at + HEADER.size <= len(data):
            length, kind, flags, sequence, _ = HEADER.unpack_from(data, at)
            yield kind, flags, sequence, data[at + HEADER.size : at + length]
            at += max(length, HEADER.size) + 3 & ~3

    def _discard(self) -> None:
        """Read what else the kernel has said about a transaction that it refused."""
        self._socket.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                self._socket.recv(1)
        self._socket.settimeout(ANSWER_SECONDS)

    def close(self) -> None:
        """Close the socket; the tables that it owns are gone."""
        self._socket.close()


def _counter(attributes: bytes) -> tuple[str, tuple[int, int]]:
    """Return name, packets and bytes of a counter."""
    found = dict(read(attributes))
    values = dict(read(found.get(4, b"")))
    return found.get(2, b"").rstrip(b"\0").decode(errors="replace"), (
        int.from_bytes(values.get(2, b""), "big"),
        int.from_bytes(values.get(1, b""), "big"),
    )
