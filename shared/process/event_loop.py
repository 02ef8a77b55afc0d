"""The event loop of a service that connects to hosts by name: the end of the process waits for no resolver."""

import asyncio
import socket
from collections.abc import Callable, Coroutine
from contextlib import suppress
from threading import Thread
from typing import Any


class _Loop(asyncio.SelectorEventLoop):
    """Looks names up in daemon threads. asyncio's own threads are waited for, by getaddrinfo(3) for a minute."""

    async def getaddrinfo(self, host: Any, port: Any, **hints: int) -> list[Any]:
        """Return the addresses of a host."""
        answer: asyncio.Future[list[Any]] = self.create_future()

        def set_unless_given_up(set_answer: Callable[[Any], None], what: object) -> None:
            if not answer.done():
                set_answer(what)

        def look_up() -> None:
            told: tuple[Callable[[Any], None], object]
            try:
                told = answer.set_result, socket.getaddrinfo(host, port, **hints)
            except (OSError, UnicodeError) as error:
                told = answer.set_exception, error
            with suppress(RuntimeError):  # the loop is closed
                self.call_soon_threadsafe(set_unless_given_up, *told)

        try:
            Thread(target=look_up, name="host lookup", daemon=True).start()
        except RuntimeError as error:  # as many threads as this process may have
            raise socket.gaierror(socket.EAI_AGAIN, str(error)) from None
        return await answer


def run_loop(main: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine in such a loop, as asyncio.run does."""
    with asyncio.Runner(loop_factory=_Loop) as runner:
        runner.run(main)
