"""Collectors served side by side: system calls that send need no interpreter lock, so threads share the cores."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

MEMBERS: Final = min(4, len(os.sched_getaffinity(0)))
"""More threads than cores do nothing at once, and ingest and broker need some of the cores too."""
WORTH_SHARING: Final = 128
"""Datagrams to one collector; fewer are sent before another thread has begun."""

T = TypeVar("T")
R = TypeVar("R")


class SendThreads:
    """Threads that live as long as the process, begun when they are first needed."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(MEMBERS, "crew")

    def share(self, work: Callable[[int, Sequence[T]], R], items: Sequence[T], datagrams: int) -> list[R]:
        """Call `work(member, part)` on parts of `items`, which together mean sending this many datagrams.

        Return its results, one a part; it is called once with everything where sharing is not worth it. No two calls
        have the same `member` number at a time.
        """
        members = min(MEMBERS, len(items)) if datagrams >= WORTH_SHARING else 1
        parts = [items[number::members] for number in range(members)]
        others = [self._threads.submit(work, number, parts[number]) for number in range(1, members)]
        return [work(0, parts[0]), *(other.result() for other in others)]
