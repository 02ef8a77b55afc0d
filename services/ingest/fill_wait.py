"""A wait for more datagrams, so that a batch fills."""

import time
from typing import Final

from shared.datagrams.limits import MAX_ROWS

FIRST_WAIT_SECONDS: Final = 0.0003
"""Time that datagrams wait for others that come right behind them, after a pause."""
RECORD_SIZE: Final = 1024
"""Bytes the kernel charges a datagram beyond its payload, about (struct sk_buff and rounding)."""


class FillWait:
    """Waits while datagrams keep coming, `most_seconds` at most: waking for each costs more than handling it."""

    def __init__(self, most_seconds: float) -> None:
        self._most_seconds = most_seconds
        self._received_at = self._wait_seconds = 0.0
        self.smallest_buffer = 0
        """Bytes of the smallest receive buffer."""

    def wait(self, now: float, count: int, size: int) -> None:
        """Wait a moment after `count` datagrams of `size` bytes together.

        After a pause nothing waits, so that a lone datagram and a burst leave at once. Then each wait is twice as long
        as the one before it. There is no wait for datagrams that might not fit the receive buffer meanwhile.
        """
        idle = now - self._received_at >= self._most_seconds
        load = size + count * RECORD_SIZE
        if idle or count >= MAX_ROWS // 2 or load >= self.smallest_buffer // 8:
            self._wait_seconds = 0.0
        else:
            self._wait_seconds = min(self._most_seconds, 2 * self._wait_seconds or FIRST_WAIT_SECONDS)
            time.sleep(self._wait_seconds)
            now += self._wait_seconds
        self._received_at = now
