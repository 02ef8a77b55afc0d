"""Datagrams that can be told apart and checked byte by byte, and a process that collects and checks them."""

import random
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from zlib import crc32

import numpy as np
import numpy.typing as npt

from shared.datagrams.limits import MAX_DATAGRAM
from shared.datagrams.mmsg import ReceiveArena
from shared.net.sockets import enlarge_receive_buffer
from tests.stack import Stack, wait_until

RECEIVED, WRONG, READY = range(3)
_block = random.Random(11).randbytes(2 * MAX_DATAGRAM)


def payload(exporter: int, number: int, largest: int = MAX_DATAGRAM) -> bytes:
    """The datagram `number` of an exporter: its size and bytes follow from both; sizes are spread over magnitudes."""
    head = exporter.to_bytes(1) + number.to_bytes(4)
    size = max(1, min(largest, int(largest ** (crc32(head) / 2**32) * 1.2)))
    at = number % MAX_DATAGRAM
    return (head + _block[at : at + size])[:size]


def open_receiver(address: str, port: int, wanted: int = 1 << 26) -> tuple[socket.socket, int]:
    """A UDP socket with the largest buffer this user can have; return it and the buffer's bytes."""
    sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
    enlarge_receive_buffer(sock, wanted)
    sock.bind((address, port))
    return sock, sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)


def collect(address: str, port: int, largest: int, counters: npt.NDArray[np.int64]) -> None:
    """Receive for ever; count datagrams, and those that are not the next of their exporter, byte for byte."""
    sock, _ = open_receiver(address, port)
    arena = ReceiveArena()
    following: dict[int, int] = {}
    counters[READY] = 1
    while True:
        sock.setblocking(True)
        sock.recv(1, socket.MSG_PEEK)
        count = arena.receive(sock.fileno())
        for index in range(count):
            came = arena.payload(index, index + 1)
            number = following.get(came[0], 0)
            if came != payload(came[0], number, largest):
                counters[WRONG] += 1
                number = int.from_bytes(came[1:5]) if len(came) >= 5 else number
            following[came[0]] = number + 1
        arena.restore(count)
        counters[RECEIVED] += count


class CheckingCollector:
    """A collector in a process of its own, which compares every byte; its counters are in a file both have mapped."""

    def __init__(self, stack: Stack, address: str, port: int, largest: int = MAX_DATAGRAM) -> None:
        path = stack.directory / f"counters.{port}"
        self._counters = np.memmap(path, np.int64, "w+", shape=(3,))
        command = [sys.executable, "-m", "tests.traffic", address, str(port), str(largest), str(path)]
        stack.spawn(f"collector{port}", command)
        wait_until(lambda: self._counters[READY], f"collector on {port} is ready")

    @property
    def received(self) -> int:
        """Datagrams so far."""
        return int(self._counters[RECEIVED])

    @property
    def wrong(self) -> int:
        """Datagrams that were not the next of their exporter."""
        return int(self._counters[WRONG])


@contextmanager
def exporters(count: int, port: int, address: str = "127.0.0.1") -> Iterator[list[socket.socket]]:
    """Open a number of sockets with an address and port of their own each, connected to a listener."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    sockets = []
    for number in range(count):
        sock = socket.socket(family, socket.SOCK_DGRAM)
        sock.bind((f"127.0.1.{number + 1}" if family == socket.AF_INET else "::1", 0))
        sock.connect((address, port))
        sockets.append(sock)
    try:
        yield sockets
    finally:
        for sock in sockets:
            sock.close()


def pause(seconds: float = 0.0005) -> None:
    """Let others run."""
    time.sleep(seconds)


if __name__ == "__main__":
    _address, _port, _largest, _path = sys.argv[1:]
    collect(_address, int(_port), int(_largest), np.memmap(_path, np.int64, "r+", shape=(3,)))
