"""An event loop for services that wait for others, and whose end is not to wait for them."""

import asyncio
import socket
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from threading import Thread
from typing import Any, TypeVar

T = TypeVar("T")


async def in_daemon_thread(work: Callable[[], T]) -> T:
    """Return the result of work that waits. The end of the process would wait for asyncio's own threads.

    RuntimeError: this process may have no more threads.
    """
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()  # from now on it can't be cancelled: a result that nobody wants is dropped

    def run() -> None:
        try:
            future.set_result(work())
        except Exception as error:
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return await asyncio.wrap_future(future)


class _Loop(asyncio.SelectorEventLoop):
    """Looks names up in daemon threads: getaddrinfo(3) may take a minute."""

    async def getaddrinfo(self, host: Any, port: Any, **hints: int) -> list[Any]:
        """Return the addresses of a host."""
        try:
            return await in_daemon_thread(lambda: socket.getaddrinfo(host, port, **hints))
        except RuntimeError as error:
            raise socket.gaierror(socket.EAI_AGAIN, str(error)) from None


def run_loop(main: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine in such a loop, as asyncio.run does."""
    with asyncio.Runner(loop_factory=_Loop) as runner:
        runner.run(main)
