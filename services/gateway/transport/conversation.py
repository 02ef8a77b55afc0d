"""The conversation with one client: bytes, time and answers go in, and the next action comes out. No I/O.

A request waits for its answer before the next one begins. Lines that answer nothing, such as the events of `watch`, go
between answers. After the last answer, further input is discarded for a moment, so that a reset does not destroy the
answer on its way: closing a TCP socket with unread bytes sends one (RFC 2525, 2.17).
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from enum import Enum, auto
from typing import Final

from msgspec import Struct

from services.gateway.protocol.decoder import MAX_LINE, Decoder
from services.gateway.protocol.requests import Request, RequestError, SignUp
from services.gateway.render import json_line
from services.gateway.transport.deadlines import Deadlines, too_slow_reader
from services.gateway.transport.push_queue import PushQueue
from shared.settings.tables import Gateway

WRITE_SIZE: Final = 64 * 1024
"""Bytes of one write, and the transport's high-water mark: the most that a client that does not read can hold here."""
LINGER_BYTES: Final = 64 * 1024 * 1024
"""Bytes discarded from a client that goes on sending after the last answer."""


class ConversationState(Enum):
    """The state of a conversation."""

    IDLE = auto()
    """No byte of a request has come."""
    RECEIVING = auto()
    """Part of a request has come."""
    ANSWERING = auto()
    """A request waits for its answer, or the answer for the client to read it."""
    WAITING_TURN = auto()
    """The answer is out, and there may be another request: other connections have their turn first."""
    LINGERING = auto()
    """The last answer is out: further input is discarded until the client closes, or time is up."""
    CLOSED = auto()
    """The connection is cut."""


IDLE, RECEIVING, ANSWERING, WAITING_TURN, LINGERING, CLOSED = ConversationState
OVER: Final = (LINGERING, CLOSED)


class After(Enum):
    """The step that follows the answer under way."""

    NEXT_REQUEST = auto()
    FINISH = auto()
    CUT_OFF = auto()


class Write(Struct, frozen=True):
    """Write these bytes."""

    data: bytes


class Handle(Struct, frozen=True):
    """Handle this request after `wait_seconds`, and give `answer` the result."""

    request: Request
    wait_seconds: float


class Refuse(Struct, frozen=True):
    """Count this refusal after `wait_seconds`, and give `answer` its bytes."""

    refused: RequestError
    wait_seconds: float = 0.0


class WriteLastWords(Struct, frozen=True):
    """Count this refusal, and write it before all that waits."""

    refused: RequestError


class Step(Enum):
    """An action without data."""

    GIVE_WAY = auto()
    """Let other connections have their turn, then call `take_turn`."""
    HALF_CLOSE = auto()
    """Signal that no more is written, and go on reading."""
    CLOSE = auto()
    """Close when everything is written."""
    ABORT = auto()
    """Close now."""
    ABORT_SLOW = auto()
    """Count a client that does not read, and close now."""


Action = Write | Handle | Refuse | WriteLastWords | Step


class Conversation:
    """One client's conversation. After each input, perform `next_action` until it is None; then obey `reading`.

    `delay` notes a request, and returns the seconds that it has to wait; a client that has to wait is told `origin`.
    """

    __slots__ = (
        "_after", "_decoder", "_delay", "_delay_told", "_discarded", "_due", "_origin", "_outgoing",
        "_pushed", "_settings", "_stalled", "_unread", "deadlines", "ended", "reading", "state",
    )  # fmt: skip

    def __init__(self, settings: Gateway, deadlines: Deadlines, origin: str, delay: Callable[[], float]) -> None:
        self.deadlines = deadlines
        self._settings = settings
        self._origin = origin
        self._delay = delay
        self._delay_told = False
        self._decoder = Decoder()
        self._unread = False  # there may be a request in the decoder
        self.ended = False  # the client sends no more
        self._stalled = False  # the client does not read what is written
        self._outgoing: Iterator[bytes] | None = None
        self._after = After.NEXT_REQUEST
        self._pushed = PushQueue(settings.output_buffer)
        self._discarded = 0
        self._due: deque[Action] = deque()
        self.reading = True  # not while a client sends faster than it reads answers
        self.state = IDLE
        deadlines.await_first_byte()

    @property
    def over(self) -> bool:
        """Return whether the conversation is over."""
        return self.state in OVER

    @property
    def buffered(self) -> int:
        """Bytes held: of requests, and of pushed lines."""
        return self._decoder.buffered + self._pushed.size

    def receive(self, data: bytes) -> None:
        """Note bytes that were read."""
        if self.state is LINGERING:
            self._discarded += len(data)
            if self._discarded > LINGER_BYTES:
                self._cut(Step.ABORT)
        elif self.state is not CLOSED:
            self._decoder.feed(data)
            self._unread = True
            self.reading = self._decoder.buffered <= MAX_LINE

    def receive_end(self) -> None:
        """Note that the client sends no more, but may still read: its requests are answered."""
        self.ended = True
        self._decoder.end()
        self._unread = True

    def abandon(self) -> None:
        """Note that the client has closed both directions: nothing that is written arrives any more."""
        self.ended = True
        self.state = LINGERING
        self.deadlines.await_close()

    def pause_writing(self) -> None:
        """Note that the client is behind by `WRITE_SIZE`."""
        self._stalled = True
        self.deadlines.await_reader()

    def resume_writing(self) -> None:
        """Note that the client has caught up."""
        self._stalled = False
        if self.over:
            return
        self.deadlines.suspend()
        if self.state is RECEIVING:
            self.state = IDLE  # the deadline of being behind has taken the place of the request's
        self._unread = True

    def take_turn(self) -> None:
        """Go on with the next request, after `Step.GIVE_WAY`."""
        if self.state is WAITING_TURN:
            self.state = IDLE
            self._unread = True

    def answer(self, parts: Sequence[bytes], *, closes: bool = False) -> None:
        """Send the answer to the request under way; `closes`: no request follows."""
        if self.state is ANSWERING:
            self._outgoing = split_answer(parts)
            if closes:
                self._finish_after()

    def refuse(self, refused: RequestError) -> None:
        """Answer with a refusal."""
        self.state = ANSWERING
        self.deadlines.suspend()
        self._due.append(Refuse(refused))

    def push(self, lines: bytes) -> None:
        """Send whole lines that answer no request, behind the answer under way, up to a limit."""
        if self.over or self._after is After.CUT_OFF:
            return
        self._pushed.append(lines)
        if self._pushed.too_many and (self._stalled or self.state is ANSWERING):
            self._after = After.CUT_OFF
            self._pushed.clear()
            if self.state is not ANSWERING:  # else a part of the answer may be written: all of it comes first
                self._cut_off()

    def drain(self) -> None:
        """Begin no more requests; finish once the answer under way, if any, is sent."""
        self._finish_after()
        if self.state is not ANSWERING and not self.over:
            self._finish()

    def drop(self) -> None:
        """Cut the connection, and release all that waits."""
        self._decoder = Decoder()
        self._cut(Step.ABORT)

    def expire(self, *, needed: bool) -> None:
        """Act on a deadline that has passed; `needed`: the connection is of use though it is idle."""
        if self.over:
            self._cut(Step.ABORT)
        elif self._stalled and needed and self.state is not ANSWERING:
            self._pushed.clear()
            self._cut_off()
        elif self._stalled:
            self._cut(Step.ABORT_SLOW)
        elif needed and self.deadlines.introduced and self.state is IDLE:
            self.deadlines.await_first_byte()
        else:
            self.refuse(self.deadlines.too_slow(receiving=self.state is RECEIVING))

    def next_action(self) -> Action | None:
        """Return the next action; None: nothing until the next input."""
        while not self._due:
            if self._stalled or self.state in OVER:
                return None
            if self.state is ANSWERING:
                if self._outgoing is None:
                    return None
                if piece := next(self._outgoing, b""):
                    return Write(piece)
                self._end_answer()
            elif self._pushed.size:  # before the next answer: no event may follow a list that shows its result already
                return Write(self._pushed.pop())
            elif self._after is After.FINISH:
                self._finish()
            elif self._unread and self.state is not WAITING_TURN:
                self._begin_request()
            else:
                return None
        return self._due.popleft()

    def _begin_request(self) -> None:
        self._unread = False
        try:
            request = self._decoder.next_request()
        except RequestError as refused:
            if refused.closes:
                self.refuse(refused)
            else:
                self._begin(refused)
            return
        finally:
            self.reading = self._decoder.buffered <= MAX_LINE
        if request is not None:
            self._begin(request)
        elif self.ended:
            self._finish()
        else:
            self._await_request()

    def _begin(self, request: Request | RequestError) -> None:
        """Begin to answer a request, or one that the decoder has refused: it costs its sender as much."""
        wait_seconds = self._delay()
        if wait_seconds and not (self._delay_told or isinstance(request, SignUp)):  # a name gets one answer only
            self._delay_told = True
            most = self._settings.requests_per_second
            why = f"more than {most} requests a second come from {self._origin}: yours are delayed; send fewer"
            self._due.append(Write(json_line(event="slowed", message=why)))
        self.state = ANSWERING
        self.deadlines.suspend()
        if isinstance(request, SignUp):
            self._finish_after()
        self._due.append(
            Refuse(request, wait_seconds) if isinstance(request, RequestError) else Handle(request, wait_seconds)
        )

    def _await_request(self) -> None:
        if not self._decoder.buffered:
            self.state = IDLE
            self.deadlines.await_first_byte()
        elif self.state is not RECEIVING:
            self.state = RECEIVING
            self.deadlines.await_last_byte()

    def _end_answer(self) -> None:
        self._outgoing = None
        if self._after is After.CUT_OFF:
            self._cut_off()
        elif self._after is After.NEXT_REQUEST and (self._decoder.buffered or self.ended):
            self.state = WAITING_TURN
            self._due.append(Step.GIVE_WAY)
        else:
            self._await_request()

    def _finish_after(self) -> None:
        if self._after is After.NEXT_REQUEST:
            self._after = After.FINISH

    def _finish(self) -> None:
        """Write nothing more, and give the client a moment to read and to close as well."""
        self.state = LINGERING
        self.reading = True  # to throw away
        self.deadlines.await_close()
        self._due.append(Step.CLOSE if self.ended else Step.HALF_CLOSE)

    def _cut_off(self) -> None:
        """End the conversation with a client that does not read; the reason follows the unread lines."""
        self._due.append(WriteLastWords(too_slow_reader()))
        self._finish()

    def _cut(self, step: Step) -> None:
        self.state = CLOSED
        self.deadlines.end()
        self._outgoing = None
        self._pushed.clear()
        self._due.clear()
        self._due.append(step)


def split_answer(parts: Sequence[bytes]) -> Iterator[bytes]:
    """Yield an answer in writes of about `WRITE_SIZE` bytes, keeping only its parts."""
    gathered: list[memoryview] = []
    size = 0
    for part in parts:
        for at in range(0, len(part), WRITE_SIZE):
            gathered.append(memoryview(part)[at : at + WRITE_SIZE])
            size += len(gathered[-1])
            if size >= WRITE_SIZE:
                yield b"".join(gathered)
                gathered, size = [], 0
    if gathered:
        yield b"".join(gathered)
