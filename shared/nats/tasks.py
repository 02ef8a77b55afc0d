"""Tasks that use a connection, and their end.

nats-py waits by `asyncio.wait_for`. Before Python 3.12 that swallows a cancellation which comes just when what it waits
for does: the task goes on as if nothing had been.
"""

import asyncio
from collections.abc import Iterable
from typing import Any, Final

AGAIN_SECONDS: Final = 0.25
"""Time after which a task that has not ended is cancelled again."""
CLOSING_SECONDS: Final = 2.0
"""Likewise one that ends a connection then."""


async def end_tasks(tasks: Iterable[asyncio.Task[Any]], again: float = AGAIN_SECONDS) -> None:
    """Cancel tasks until all have ended; what they have failed with is the caller's to ask for."""
    every = set(tasks)
    left = {task for task in every if not task.done()}
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=again)
    await asyncio.gather(*every, return_exceptions=True)
