"""What a process takes of the host's memory, against the ceiling that its settings give it.

Each queue has a bound of its own, but many may be full at once. So a service looks at all that it takes together, a
hundred times a second at most, and when that comes near the ceiling it lets go of something before the kernel would end
it, by the policy that deploy/README.md gives under "Memory".
"""

import ctypes
import os
import time
from collections.abc import Callable
from typing import Final

import structlog

from shared.ledger import MEMORY, MEMORY_CEILING, MEMORY_MOST

LOOK_SECONDS: Final = 0.01
"""Between two looks: the bus brings some 10 MB in that time. A look costs some 10 µs."""
RESERVE: Final = 8
"""One part in so many of the ceiling is kept for what comes between two looks, unless a service wants more."""
TRIM_SECONDS: Final = 0.5
SAID_SECONDS: Final = 10.0
_PAGE: Final = os.sysconf("SC_PAGESIZE")
_statm: Final = os.open("/proc/self/statm", os.O_RDONLY)
"""From the start: when it matters there may be no descriptor to spare."""
_trim: Final[Callable[[int], int] | None] = getattr(ctypes.CDLL(None), "malloc_trim", None)
"""malloc_trim(3): what was freed goes back to the kernel. glibc has it, others give it back by themselves."""

log = structlog.get_logger()


class Memory:
    """A process's memory. `setting` is where its ceiling, in bytes, is set; 0: there is none.

    It is short when less than one part in `reserve` of the ceiling is left. `borrows`: what it maps together with other
    processes is theirs, see `shared.bus.loans`.
    """

    def __init__(self, ceiling: int = 0, setting: str = "", *, reserve: int = RESERVE, borrows: bool = False) -> None:
        self.ceiling = ceiling
        self.short = False
        """Whether the last look has found less than the reserve."""
        self.used = self.most = 0
        """Bytes, as of the last look, and of the look that found most."""
        self._full = ceiling - ceiling // reserve
        self._setting = setting
        self._borrows = borrows
        self._look_at = self._trim_at = self._say_at = 0.0

    def measure(self) -> bool:
        """Whether something has to go now; to be asked in each turn of a loop, and looks only when it is time."""
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
            log.warning("memory is short: dropping", used=self.used, ceiling=self.ceiling, setting=self._setting)
        return self.short

    @property
    def _over(self) -> bool:
        return bool(self.ceiling) and self.used > self._full

    def _measure(self) -> None:
        """Read how much is resident: private pages, and unless it `borrows` shared and mapped ones (proc(5), statm)."""
        _, resident, shared, *_ = map(int, os.pread(_statm, 256, 0).split())
        self.used = (resident - shared * self._borrows) * _PAGE
        self.most = max(self.most, self.used)

    def account(self) -> dict[str, int]:
        """Gauges for the status, measured now."""
        self._measure()
        return {MEMORY: self.used, MEMORY_MOST: self.most, MEMORY_CEILING: self.ceiling}
