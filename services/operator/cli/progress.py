"""Progress of long work: a line on the terminal that is written over, and gone at the end."""

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

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


class Bar:
    """Shows a bar with the share and the datagrams sent, and the time that is left; nothing without a terminal."""

    def __init__(self) -> None:
        self._bar: RichProgress | None = None
        self._show_at = 0.0

    def show(self, count: int, share: float) -> None:
        """Show the count and the share, from 0 to 1, if it is time."""
        if self._bar is not None and (now := time.monotonic()) >= self._show_at:
            self._show_at = now + STEP_SECONDS
            self._bar.update(self._bar.task_ids[0], completed=share, description=f"{count} datagrams sent")

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

            columns = (BarColumn(), TaskProgressColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.add_task("0 datagrams sent", total=1.0)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
