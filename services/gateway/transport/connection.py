"""One client's connection, and all of them together: bytes to the decoder, answers back, and every limit kept.

A connection is in one of four conditions: it waits for a request; its request waits for an answer; its answer waits for
the client to take it; or all is said, and what still comes is thrown away for a moment so that a reset does not destroy
the answer on its way (closing a TCP socket with unread bytes sends one, RFC 2525, 2.17). What it is told without having
asked, such as the events of `watch`, goes between answers.

TLS has no half-closed connections here: asyncio ends both directions at once. A client that closes its own ends the
conversation, and what ours has to say last is closed as soon as the client has been silent for a moment.
"""

import asyncio
import contextlib
import itertools
import math
from collections import Counter, deque
from collections.abc import Iterator
from typing import Final, cast

from services.gateway.admission.peer import identify, origin
from services.gateway.admission.rights import HERE, Rights, common_name
from services.gateway.counters import CONNECTIONS_REFUSED, CUT_FOR_MEMORY, REQUESTS_DELAYED, TOO_SLOW
from services.gateway.handler import Answer, Handler
from services.gateway.protocol.decoder import MAX_LINE, Decoder
from services.gateway.protocol.requests import Auth, Id, Request, RequestError, SignUp
from services.gateway.render import json_line
from services.gateway.transport.rate_limit import RateLimit
from shared.process.memory import Memory
from shared.settings.model import Gateway

READ_SIZE: Final = 64 * 1024
WRITE_SIZE: Final = 64 * 1024
"""Bytes handed to a transport at a time, and its high-water mark: what a client that does not read can hold here."""
LINGER_BYTES: Final = 64 * 1024 * 1024
SILENT_SECONDS: Final = 0.2
"""A TLS connection on which all is said is closed when nothing came for so long."""
AT_ONCE: Final = 32
"""Connections that begin, or end for being late, before those that are open have their turn."""
REFUSING_MAX: Final = 32
"""Connections over the limit that are told so at once; more are closed without a word."""


class Connections:
    """All open connections, and what they share."""

    def __init__(self, handler: Handler, settings: Gateway, limit: int, memory: Memory) -> None:
        self.handler = handler
        self.memory = memory
        self.settings = settings
        self.limit = limit
        self.receive_buffer = memoryview(bytearray(READ_SIZE))  # the loop fills it and hands it over in one step
        self.loop = asyncio.get_running_loop()
        self.numbers = itertools.count(1)
        self.open: set[Connection] = set()
        self.by_origin: Counter[str] = Counter()
        self.pace = RateLimit(settings.requests_per_second, self.loop.time)

    async def sweep(self) -> None:
        """End what has waited too long; of many that do, a few at a time, and others have their turn in between."""
        self.pace.forget()
        self.save_memory()
        now = self.loop.time()
        late = [connection for connection in self.open if connection.deadline <= now]
        for some in (late[at : at + AT_ONCE] for at in range(0, len(late), AT_ONCE)):
            for connection in some:
                if connection in self.open and connection.deadline <= now:
                    connection.expire()
            await asyncio.sleep(0)

    def save_memory(self) -> None:
        """When memory is short, cut half of those for which anything waits, most first."""
        if self.memory.measure():
            waiting = sorted((each for each in self.open if each.waiting), key=lambda each: each.waiting, reverse=True)
            for connection in waiting[: (len(waiting) + 1) // 2]:
                self.handler.counters[CUT_FOR_MEMORY] += 1
                connection.cut()

    async def drain(self, seconds: float) -> None:
        """Finish the answers under way, take no more requests, and close; what is not over by then is cut."""
        for connection in list(self.open):
            connection.drain()
        deadline = self.loop.time() + seconds
        while self.open and self.loop.time() < deadline:
            await asyncio.sleep(0.01)
        for connection in list(self.open):
            connection.abort()
        await asyncio.sleep(0)  # transports tell their protocols in the next turn


class Connection(asyncio.BufferedProtocol):
    """A client's connection."""

    __slots__ = (
        "_all",
        "_answering",
        "_by_us",
        "_cutting",
        "_decoder",
        "_discarded",
        "_ended",
        "_gone_by",
        "_half_closes",
        "_introduced_by",
        "_last",
        "_lingering",
        "_origin",
        "_outgoing",
        "_pushed",
        "_pushed_bytes",
        "_receiving",
        "_remote",
        "_silent",
        "_slowed",
        "_stalled",
        "_transport",
        "_visitor",
        "deadline",
    )

    def __init__(self, connections: Connections, *, remote: bool = False) -> None:
        self._all = connections
        self._remote = remote  # its listener is not for this host alone
        self._decoder = Decoder()
        self._outgoing: Iterator[bytes] = iter(())
        self._answering = False
        self._ended = False  # the client sends no more
        self._stalled = False  # the client does not take what is written
        self._receiving = False  # part of a request has come
        self._last = False  # nothing is taken after the answer under way
        self._by_us = False  # it ends because the gateway does
        self._pushed: deque[bytes] = deque()
        self._pushed_bytes = 0
        self._cutting = False  # it does not read what it watches, and ends after the answer under way
        self._slowed = False  # it has been told that its requests wait
        self._lingering = False
        self._silent = False  # over TLS: all is said, and the client is waited for to say no more
        self._discarded = 0
        self.deadline = math.inf

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Admit the connection, or say why not."""
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(WRITE_SIZE)
        self._half_closes = self._transport.can_write_eof()
        self._visitor = identify(self._transport, next(self._all.numbers), self._rights())
        self._introduced_by = self._all.loop.time() + self._all.settings.request_seconds
        self._origin = origin(self._visitor)
        self._all.open.add(self)
        self._all.by_origin[self._origin] += 1
        self._all.handler.arrive(self._visitor, self._push)
        excess, why = self._excess()
        if excess <= 0:
            self._await_request()
            return
        self._all.handler.counters[CONNECTIONS_REFUSED] += 1
        if excess > REFUSING_MAX:
            self._transport.abort()
        else:
            self._refuse(RequestError("unavailable", why, closes=True))

    def _excess(self) -> tuple[int, str]:
        """By how many there are too many connections, and which are."""
        most = self._all.settings.max_connections_per_address
        excess = self._all.by_origin[self._origin] - most
        if excess > 0:
            return excess, f"{self._origin} has {most} connections open, as many as an address may; close some"
        return len(self._all.open) - self._all.limit, "as many connections as allowed are open; try again"

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        """Let go of what lasted as long as the connection."""
        self._all.open.discard(self)
        self._all.by_origin[self._origin] -= 1
        if not self._all.by_origin[self._origin]:
            del self._all.by_origin[self._origin]
        self._lingering = True
        self._all.handler.depart(self._visitor, by_us=self._by_us)

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002
        """Where the loop puts what it reads next."""
        return self._all.receive_buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Take what was read."""
        if self._lingering:
            self._discarded += nbytes
            self._wait_for_silence()
            if self._discarded > LINGER_BYTES:
                self._transport.abort()
            return
        self._all.save_memory()
        self._decoder.feed(bytes(self._all.receive_buffer[:nbytes]))
        self._take_request()

    def eof_received(self) -> bool:
        """The client sends no more, but may still read: keep the connection until all is answered."""
        self._ended = True
        if not self._half_closes:
            self._lingering = True  # asyncio closes it now: nothing that is written gets there any more
            return False
        self._decoder.end()
        self._take_request()
        return not self._lingering

    def pause_writing(self) -> None:
        """The client is behind by `WRITE_SIZE`."""
        self._stalled = True
        self.deadline = self._all.loop.time() + self._all.settings.request_seconds

    def resume_writing(self) -> None:
        """The client has caught up."""
        self._stalled = False
        if self._lingering:
            return
        self.deadline = math.inf
        if self._answering:
            self._write()
            return
        self._write_pushed()
        self._receiving = False  # being behind has taken the place of its deadline
        self._take_request()

    def expire(self) -> None:
        """The deadline has passed: say so if the client can be expected to read it."""
        settings = self._all.settings
        if self._stalled and not self._lingering and self._all.handler.stays(self._visitor) and not self._answering:
            self._cut_off()
        elif self._silent and not self._transport.is_closing():
            self._transport.close()
            self.deadline = math.inf  # asyncio gives it ssl_shutdown_timeout
        elif self._lingering or self._stalled:
            self._all.handler.counters[TOO_SLOW] += not self._lingering
            self._transport.abort()
        elif not self._visitor.rights.scopes:
            self._refuse(RequestError("too_slow", f"op auth has {settings.request_seconds:g} s to come", closes=True))
        elif self._receiving:
            self._refuse(RequestError("too_slow", f"a request has {settings.request_seconds:g} s to come", closes=True))
        elif self._all.handler.stays(self._visitor):
            self.deadline = self._all.loop.time() + settings.idle_seconds
        else:
            self._refuse(RequestError("too_slow", f"nothing came for {settings.idle_seconds:g} s", closes=True))

    @property
    def waiting(self) -> int:
        """Bytes that wait here, to be understood or to be taken."""
        return self._decoder.buffered + self._pushed_bytes + self._transport.get_write_buffer_size()

    def cut(self) -> None:
        """Cut the connection and let go of all that waits, because others need the memory."""
        self._lingering = True
        self._decoder = Decoder()
        self._outgoing = iter(())
        self._pushed.clear()
        self._pushed_bytes = 0
        self._transport.abort()

    def drain(self) -> None:
        """Take no more requests; close once the answer under way, if any, is sent."""
        self._last = self._by_us = True
        if not (self._answering or self._lingering):
            self._finish()

    def abort(self) -> None:
        """Cut the connection, because the gateway ends."""
        self._by_us = True
        self._transport.abort()

    def _take_request(self) -> None:
        """Begin the next request, if there is one and none is under way."""
        # What was pushed before goes before the answer too: a list must not be followed by what is on it already.
        # Nor is more said to who does not take what was said: its deadline is for that.
        if not (self._answering or self._lingering or self._pushed or self._stalled):
            try:
                request = self._decoder.next_request()
            except RequestError as refused:
                self._refuse(refused)
            else:
                self._begin(request)
        self._throttle()

    def _begin(self, request: Request | None) -> None:
        if request is None:
            if self._ended:
                self._finish()
            else:
                self._await_request()
            return
        wait = self._all.pace.take(self._origin)
        if wait:
            self._slow_down(request)
        self._answering, self._receiving, self.deadline = True, False, math.inf
        self._last |= isinstance(request, SignUp)
        if wait:
            self._all.loop.call_later(wait, self._answer, request)
        else:
            self._answer(request)

    def _slow_down(self, request: Request) -> None:
        """Count a request that has to wait, and say once why; a name has one answer, and nothing may go before it."""
        self._all.handler.counters[REQUESTS_DELAYED] += 1
        if self._slowed or isinstance(request, SignUp):
            return
        self._slowed = True
        most = self._all.settings.requests_per_second
        why = f"over {most} requests a second come from {self._origin}: yours wait, and are answered late"
        self._push(json_line(event="slowed", message=why))

    def _answer(self, request: Request) -> None:
        if self._lingering or self._transport.is_closing():
            return  # it has gone while its request waited
        try:
            if isinstance(request, Auth):
                self._visitor = self._all.handler.authenticate(request, self._visitor)
            self._all.handler.answer(request, self._visitor, self._reply)
        except RequestError as refused:
            self._refuse(refused, None if isinstance(request, SignUp) else request.id)

    def _await_request(self) -> None:
        now, settings = self._all.loop.time(), self._all.settings
        if not self._decoder.buffered:
            self._receiving, self.deadline = False, now + settings.idle_seconds
        elif not self._receiving:  # from its first byte, whatever comes later
            self._receiving, self.deadline = True, now + settings.request_seconds
        if not self._visitor.rights.scopes:  # whatever it says meanwhile
            self.deadline = min(self.deadline, self._introduced_by)

    def _throttle(self) -> None:
        """Stop reading from a client that sends faster than it takes answers."""
        if self._ended:
            return
        if self._decoder.buffered > MAX_LINE and not self._lingering:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    def _refuse(self, refused: RequestError, id: Id | None = None) -> None:
        self._answering, self._receiving, self.deadline = True, False, math.inf
        self._last |= refused.closes
        self._reply(self._all.handler.refuse(refused, id))

    def _reply(self, answer: Answer) -> None:
        self._outgoing = pieces(answer)
        self._write()

    def _write(self) -> None:
        """Write until the client is behind; after the last piece the next request has its turn behind the others'."""
        while not (self._stalled or self._lingering or self._transport.is_closing()):
            piece = next(self._outgoing, b"")
            if not piece:
                self._answered()
                return
            self._transport.write(piece)

    def _push(self, lines: bytes) -> None:
        """Send whole lines that answer no request, behind the answer under way; not without end."""
        self._all.save_memory()
        if self._lingering or self._cutting:
            return
        self._pushed.append(lines)
        self._pushed_bytes += len(lines)
        if self._pushed_bytes > self._all.settings.output_buffer and (self._stalled or self._answering):
            self._cut_off()
        elif not self._answering:
            self._write_pushed()

    def _write_pushed(self) -> None:
        while self._pushed and not (self._stalled or self._transport.is_closing()):
            lines = self._pushed.popleft()
            self._pushed_bytes -= len(lines)
            self._transport.write(lines)

    def _cut_off(self) -> None:
        """Let go of a client that does not read what it watches; told so behind what it has not read yet."""
        self._pushed.clear()
        self._pushed_bytes = 0
        self._cutting = True
        if self._answering:
            return  # a part of the answer may be written already: all of it, or an abort, comes first
        self._transport.write(self._all.handler.refuse_slow())
        self._finish()

    def _answered(self) -> None:
        self._answering = False
        if self._cutting:
            self._cut_off()
            return
        self._write_pushed()
        if self._last:
            self._finish()
        elif self._decoder.buffered or self._ended:
            self._all.loop.call_soon(self._take_request)
        elif not self._stalled:
            self._await_request()

    def _finish(self) -> None:
        """All is said: half-close, and give the client a moment to read it and close as well."""
        self._lingering = True
        self._gone_by = self.deadline = self._all.loop.time() + self._all.settings.request_seconds
        if self._ended:
            self._transport.close()
            return
        if self._half_closes:
            with contextlib.suppress(OSError):  # the client has reset the connection
                self._transport.write_eof()
        else:
            self._silent = True
            self._wait_for_silence()

    def _wait_for_silence(self) -> None:
        """Over TLS: put off closing while bytes come, which closing now would answer with a reset."""
        if self._silent:
            self.deadline = min(self._gone_by, self._all.loop.time() + SILENT_SECONDS)

    def _rights(self) -> Rights:
        if not self._remote:
            return HERE
        return self._all.handler.tokens.of_certificate(common_name(self._transport.get_extra_info("peercert")))


def pieces(answer: Answer) -> Iterator[bytes]:
    """Yield an answer in pieces of about `WRITE_SIZE` bytes, holding on to its parts only."""
    gathered: list[memoryview] = []
    size = 0
    for part in answer:
        for at in range(0, len(part), WRITE_SIZE):
            gathered.append(memoryview(part)[at : at + WRITE_SIZE])
            size += len(gathered[-1])
            if size >= WRITE_SIZE:
                yield b"".join(gathered)
                gathered, size = [], 0
    if gathered:
        yield b"".join(gathered)
