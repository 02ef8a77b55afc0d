"""The gateway with a clock that a test sets: leases go by it, and expire when the test says so, never in between.

Run as a program with the clock's file, it is the gateway; everything but time is as it is without.
"""

import mmap
import sys
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Final
from unittest import mock

from services.gateway import server, start
from services.gateway.__main__ import main
from services.gateway.registry.registry import Registry
from tests.stack import wait_until

NOW, ASKED, DONE = range(3)
START: Final = 1000.0


class Clock:
    """Seconds, in a file that the test and the gateway have mapped; and how often leases were to expire, and have."""

    def __init__(self, path: Path) -> None:
        """Map the file; one that is not there is a clock at `START`."""
        if not path.exists():
            path.write_bytes(array("d", [START, 0, 0]))
        with path.open("r+b") as file:
            self._mapped = mmap.mmap(file.fileno(), 0)
        self._cells = memoryview(self._mapped).cast("d")

    @property
    def now(self) -> float:
        """Return the gateway's time."""
        return self._cells[NOW]

    def pass_by(self, seconds: float) -> None:
        """Let time pass, and wait until what was due by then has expired."""
        self._cells[NOW] += seconds
        self._cells[ASKED] += 1
        wait_until(lambda: self._cells[DONE] == self._cells[ASKED], "leases are looked at")

    def heed(self, expire: Callable[[], None]) -> None:
        """Let leases expire if that was asked for."""
        asked = self._cells[ASKED]
        if self._cells[DONE] != asked:
            expire()
            self._cells[DONE] = asked

    def close(self) -> None:
        """Let go of the file."""
        self._cells.release()
        self._mapped.close()


def run(path: Path) -> int:
    """Be the gateway."""
    clock, expire = Clock(path), Registry.expire
    times = SimpleNamespace(
        CLOCK_BOOTTIME=time.CLOCK_BOOTTIME,
        clock_gettime=lambda _: clock.now,
        time_ns=lambda: int(START * 1e9),  # it stands still: what was kept alone keeps generations apart
        monotonic=time.monotonic,
        time=lambda: START,
    )
    with (
        mock.patch.object(start, "time", times),
        mock.patch.multiple(server, time=times, TICK_SECONDS=0.005),
        mock.patch.object(Registry, "expire", lambda registry: clock.heed(lambda: expire(registry))),
    ):
        return main([])


if __name__ == "__main__":
    sys.exit(run(Path(sys.argv[1])))
