import asyncio
import socket
from threading import Thread

import pytest

from shared.process.event_loop import run_loop


def test_a_loop_that_may_have_no_more_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name can't be looked up then, which is an OSError like any other: the next attempt to connect may do."""

    def refuse(_: Thread) -> None:
        raise RuntimeError("can't start new thread")

    async def ask() -> None:
        monkeypatch.setattr(Thread, "start", refuse)
        with pytest.raises(socket.gaierror, match="can't start new thread"):
            await asyncio.get_running_loop().getaddrinfo("one.example", 9)

    run_loop(ask())
