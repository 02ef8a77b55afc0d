"""Connections accepted one by one: asyncio's own server would not count handshakes, nor tell whose they are."""

import asyncio
import socket
from collections.abc import Callable, Coroutine
from typing import Any, Final

from shared.log import get_logger
from shared.net.connection_shares import origin_of

RETRY_SECONDS: Final = 1.0
"""Wait after a failed accept, for example without a descriptor to spare; asyncio waits as long too."""

Work = Coroutine[Any, Any, None]
Begin = Callable[[socket.socket, str], Work | None]
"""Takes a connection and its origin, and returns what to do with it; None: there is no room, and it is closed."""

log = get_logger()


class Acceptor:
    """Accepts on listeners, each connection with a task of its own. `trouble` is logged when that fails."""

    def __init__(self, trouble: str) -> None:
        self._trouble = trouble
        self._tasks: set[asyncio.Task[None]] = set()

    def accept_on(self, listener: socket.socket, begin: Begin) -> None:
        """Accept from now on, at a socket that listens and does not block."""
        self._start(self._accept(listener, begin))

    async def stop(self) -> None:
        """Accept no more, and cut the handshakes under way."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _start(self, work: Work) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self, listener: socket.socket, begin: Begin) -> None:
        while True:
            try:
                sock, address = await asyncio.get_running_loop().sock_accept(listener)
            except ConnectionAbortedError:  # the client has gone before it was accepted
                continue
            except OSError as error:
                log.warning(self._trouble, reason=error.strerror)
                await asyncio.sleep(RETRY_SECONDS)
                continue
            if work := begin(sock, origin_of(address[0] if address else "")):
                self._start(work)
            else:
                sock.close()
            await asyncio.sleep(0)  # give others a turn, however many clients connect
