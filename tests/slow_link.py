"""A slow link between two hosts of the tests: two TUN interfaces, and a thread that carries packets between them.

It has a rate and a delay each way, and a queue that drops what is too much, as a router has (netem is not in every
kernel). So TCP behaves on it as on a real one.
"""

import fcntl
import os
import select
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

import pytest

from tests.capabilities import NET_ADMIN, ambient
from tests.network import End

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
QUEUE_SECONDS: Final = 0.25
"""The most that waits for its turn."""
LARGEST: Final = 65_536


@dataclass
class _Direction:
    """One way: packets with the time at which each arrives."""

    source: int
    target: int
    free_at: float = 0.0
    packets: deque[tuple[float, bytes]] = field(default_factory=deque)
    carried: int = 0

    def take(self, bits_per_second: float, delay: float) -> None:
        """Take a packet, if the queue has room."""
        packet, now = os.read(self.source, LARGEST), time.monotonic()
        if self.free_at < now + QUEUE_SECONDS:
            self.free_at = max(now, self.free_at) + len(packet) * 8 / bits_per_second
            self.packets.append((self.free_at + delay, packet))

    def hand_on(self) -> float:
        """Hand on what arrives now; return the seconds until there is more."""
        while self.packets:
            left = self.packets[0][0] - time.monotonic()
            if left > 0:
                return left
            packet = self.packets.popleft()[1]
            self.carried += len(packet)
            os.write(self.target, packet)
        return 1.0


def _open(end: End) -> int:
    with end.host.entered(), ambient(NET_ADMIN):
        try:
            descriptor = os.open("/dev/net/tun", os.O_RDWR)
        except OSError as error:
            pytest.skip(f"/dev/net/tun: {error.strerror}")
        fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH22x", end.name.encode(), IFF_TUN | IFF_NO_PI))
    own, _, other = end.addresses.partition(" ")
    end.host.run("ip", "address", "add", own, "peer", other, "dev", end.name)
    end.host.run("ip", "link", "set", end.name, "up")
    end.host.assert_no_default_route()
    return descriptor


@contextmanager
def slow_link(a: End, b: End, bits_per_second: float, delay: float) -> Iterator[Callable[[], int]]:
    """A link that takes `delay` seconds each way; the addresses of an end are its own and its peer's.

    It yields what returns the bytes that have arrived at `b`.
    """
    one, other = _open(a), _open(b)
    ways = _Direction(one, other), _Direction(other, one)
    ended = threading.Event()

    def carry() -> None:
        while not ended.is_set():
            left = min(way.hand_on() for way in ways)
            for ready in select.select([way.source for way in ways], [], [], min(left, 0.1))[0]:
                ways[ready != ways[0].source].take(bits_per_second, delay)

    thread = threading.Thread(target=carry)
    thread.start()
    try:
        yield lambda: ways[0].carried
    finally:
        ended.set()
        thread.join()
        os.close(one)
        os.close(other)
