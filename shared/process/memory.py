"""The memory that a process takes, against the ceiling of its settings.

Each queue has a limit of its own, but many may be full at once. So a service measures its memory as a whole, a hundred
times a second at most. When that comes near the ceiling it drops something before the kernel would end it, by the
policy in deploy/README.md, "Memory".
"""

import ctypes
import os
import time
import weakref
from collections.abc import Callable
from typing import Final

from shared.ledger.counters import MEMORY, MEMORY_CEILING, MEMORY_MOST
from shared.log import get_logger

LOOK_SECONDS: Final = 0.01
"""Between two measurements: the bus brings some 10 MB in that time. A measurement costs some 10 µs."""
RESERVE: Final = 8
"""One part in this many of the ceiling is kept for what comes between two measurements; a service may ask for more."""
TRIM_SECONDS: Final = 0.5
MUCH: Final = 4 << 20
"""Bytes that are worth returning to the kernel at once when they are let go: that takes a millisecond or more."""
SAID_SECONDS: Final = 10.0
_PAGE: Final = os.sysconf("SC_PAGESIZE")
_trim: Final[Callable[[int], int] | None] = getattr(ctypes.CDLL(None), "malloc_trim", None)
"""malloc_trim(3) returns freed memory to the kernel. glibc has it; other libraries return it by themselves."""

log = get_logger()


class Memory:
    """A process's memory. `setting` names the setting of its ceiling, in bytes; 0: there is none.

    It is short when less than one part in `reserve` of the ceiling is left. With `borrows`, memory that it maps
    together with other processes counts as theirs, see `shared.bus.loans`.
    """

    def __init__(self, ceiling: int = 0, setting: str = "", *, reserve: int = RESERVE, borrows: bool = False) -> None:
        self.ceiling = ceiling
        self.short = False
        """True if the last measurement found less than the reserve."""
        self.used = self.most = 0
        """Bytes, as of the last measurement, and of the one that found most."""
        self._full = ceiling - ceiling // reserve
        self._setting = setting
        self._borrows = borrows
        self._look_at = self._trim_at = self._say_at = 0.0
        # Opened at the start: when it matters there may be no descriptor to spare.
        self._statm = os.open("/proc/self/statm", os.O_RDONLY)
        weakref.finalize(self, os.close, self._statm)

    def measure(self) -> bool:
        """Return whether something has to go now; call it in each turn of a loop: it measures only when it is due."""
        now = time.monotonic()
        if now < self._look_at:
            return False
        self._look_at = now + LOOK_SECONDS
        self._measure()
        if self._over and now >= self._trim_at and _trim is not None:
            self._trim_at = now + TRIM_SECONDS
            _trim(0)
            self._measure()
        self.short = self._over
        if self.short and now >= self._say_at:
            self._say_at = now + SAID_SECONDS
            log.warning(
                "memory is short: data is dropped; raise `setting`, or find the slow reader",
                used=self.used,
                ceiling=self.ceiling,
                setting=self._setting,
            )
        return self.short

    def note_freed(self) -> None:
        """Let the next measurement return freed memory to the kernel first: `MUCH` or more was let go."""
        self._trim_at = 0.0

    @property
    def _over(self) -> bool:
        return bool(self.ceiling) and self.used > self._full

    def _measure(self) -> None:
        """Read the resident memory: private pages, and unless it `borrows` shared and mapped ones (proc(5), statm)."""
        _, resident, shared, *_ = map(int, os.pread(self._statm, 256, 0).split())
        self.used = (resident - shared * self._borrows) * _PAGE
        self.most = max(self.most, self.used)

    def account(self) -> dict[str, int]:
        """Gauges for the status, measured now."""
        self._measure()
        return {MEMORY: self.used, MEMORY_MOST: self.most, MEMORY_CEILING: self.ceiling}
