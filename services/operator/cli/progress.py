"""Progress of long work: a line on the terminal that is written over, and gone at the end."""

import sys
import time
from types import TracebackType
from typing import Final, Self

QUIET_SECONDS: Final = 1.0
"""Work that is done by then shows nothing."""
STEP_SECONDS: Final = 0.1
CLEARED: Final = "\r\x1b[K"


class Progress:
    """Shows a count of what is done, such as `12 host names looked up`; nothing where stderr is no terminal."""

    def __init__(self, done: str) -> None:
        self._done = done
        self._show_at = time.monotonic() + QUIET_SECONDS if sys.stderr.isatty() else float("inf")
        self._shown = False

    def show(self, count: int) -> None:
        """Show the count, if it is time."""
        if (now := time.monotonic()) >= self._show_at:
            self._show_at, self._shown = now + STEP_SECONDS, True
            sys.stderr.write(f"{CLEARED}{count} {self._done}")
            sys.stderr.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._shown:
            sys.stderr.write(CLEARED)
            sys.stderr.flush()
