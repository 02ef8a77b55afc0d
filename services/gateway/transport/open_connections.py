"""All open connections: their limits, those that are late, and those that are cut when memory is short."""

import asyncio
import itertools
from collections import Counter
from typing import Final

from services.gateway.admission.tokens import Tokens
from services.gateway.counters import CONNECTIONS_REFUSED, CUT_FOR_MEMORY
from services.gateway.handler import Handler
from services.gateway.protocol.requests import RequestError
from services.gateway.transport.connection import ClientConnection
from services.gateway.transport.rate_limit import RateLimit
from shared.net.connection_shares import limit_of
from shared.process.memory import MUCH, Memory
from shared.settings.tables import Gateway

READ_SIZE: Final = 64 * 1024
AT_ONCE: Final = 32
"""Connections that begin, or end for being late, before open ones have their turn."""
REFUSING_MAX: Final = 32
"""Connections over the limit that are answered at the same time; more are closed in silence."""
REFUSING_MAX_OF_ORIGIN: Final = 4
"""Those of them by TLS, from one address: handshakes that may be waited for before their result is known."""


class OpenConnections:
    """The open connections, and the objects they share; `limit` is the number of connections allowed."""

    def __init__(self, handler: Handler, settings: Gateway, limit: int, memory: Memory) -> None:
        self.handler = handler
        self.settings = settings
        self.loop = asyncio.get_running_loop()
        most_waiting = settings.max_connections_per_address
        self.rate_limit = RateLimit(settings.requests_per_second, most_waiting, self.loop.time)
        self.receive_buffer = memoryview(bytearray(READ_SIZE))  # the loop fills it and hands it over in one step
        self.numbers = itertools.count(1)
        self._memory = memory
        self._limit = limit
        self._open: set[ClientConnection] = set()
        self._by_origin: Counter[str] = Counter()
        self._handshakes: Counter[str] = Counter()
        """Handshakes under way, by origin."""

    def __len__(self) -> int:
        return len(self._open)

    def add(self, connection: ClientConnection) -> None:
        """Admit a new connection; refuse it when it is over a limit, cut it when it is far over."""
        self._open.add(connection)
        self._by_origin[connection.origin] += 1
        excess, why = self._excess(connection.origin)
        if excess <= 0:
            return
        self.handler.counters[CONNECTIONS_REFUSED] += 1
        if excess > REFUSING_MAX:
            connection.drop()
        else:
            connection.refuse(RequestError("unavailable", why, closes=True))

    def _excess(self, origin: str) -> tuple[int, str]:
        """Return the number of connections above the limit, and the reason."""
        most = self.settings.max_connections_per_address
        excess = self._by_origin[origin] - most
        if excess > 0:
            return excess, f"{origin} has reached the limit of {most} connections an address; close some"
        limit = limit_of(origin, self._limit, first=self._by_origin[origin] == 1)
        return len(self._open) - limit, "the limit of open connections is reached; try again later"

    def remove(self, connection: ClientConnection) -> None:
        """Forget a connection that is gone."""
        self._open.discard(connection)
        self._by_origin[connection.origin] -= 1
        if not self._by_origin[connection.origin]:
            del self._by_origin[connection.origin]

    def cut_changed(self, before: Tokens) -> None:
        """Cut the connections of holders whose token has changed or gone since `before`: they may connect anew."""
        for connection in [each for each in self._open if not self.handler.tokens.grant_the_same(each.holder, before)]:
            connection.drop()

    def begin_handshake(self, origin: str) -> bool:
        """Note a handshake that begins, unless there is no room for it; `end_handshake` ends it, admitted or not."""
        before = self._by_origin[origin] + self._handshakes[origin]
        in_all = len(self._open) + self._handshakes.total()
        if before >= self.settings.max_connections_per_address + REFUSING_MAX_OF_ORIGIN:
            return False
        if in_all >= limit_of(origin, self._limit, first=not before) + REFUSING_MAX:
            return False
        self._handshakes[origin] += 1
        return True

    def end_handshake(self, origin: str) -> None:
        """Note that a handshake is over."""
        self._handshakes[origin] -= 1
        if not self._handshakes[origin]:
            del self._handshakes[origin]

    async def sweep(self) -> None:
        """End connections that are late, a few at a time: others have their turn in between."""
        self.rate_limit.forget_slow()
        self.save_memory()
        now = self.loop.time()
        late = [connection for connection in self._open if connection.deadline <= now]
        for some in (late[at : at + AT_ONCE] for at in range(0, len(late), AT_ONCE)):
            for connection in some:
                if connection in self._open and connection.deadline <= now:
                    connection.expire()
            await asyncio.sleep(0)

    def save_memory(self) -> None:
        """Cut half of the connections for which anything waits, most first, when memory is short."""
        if self._memory.measure():
            waiting = sorted(
                (each for each in self._open if each.buffered), key=lambda each: each.buffered, reverse=True
            )
            cut = waiting[: (len(waiting) + 1) // 2]
            if sum(connection.buffered for connection in cut) >= MUCH:
                self._memory.note_freed()
            for connection in cut:
                self.handler.counters[CUT_FOR_MEMORY] += 1
                connection.drop()

    async def drain(self, seconds: float) -> None:
        """Finish the answers under way, begin no more requests, and close; after `seconds` cut the rest."""
        for connection in list(self._open):
            connection.drain()
        deadline = self.loop.time() + seconds
        while self._open and self.loop.time() < deadline:
            await asyncio.sleep(0.01)
        for connection in list(self._open):
            connection.abort()
        await asyncio.sleep(0)  # transports notify their protocols in the next turn
