"""One client's connection: the asyncio side of a conversation, which decides the actions."""

import asyncio
import contextlib
from functools import partial
from typing import TYPE_CHECKING, cast

from services.gateway.admission.peer import identify
from services.gateway.admission.rights import HERE, Rights
from services.gateway.admission.tokens import common_name
from services.gateway.counters import REQUESTS_DELAYED, TOO_SLOW
from services.gateway.handler import Answer
from services.gateway.protocol.requests import Auth, Id, Request, RequestError, SignUp
from services.gateway.transport.conversation import (
    WRITE_SIZE,
    Action,
    Conversation,
    ConversationState,
    Handle,
    Refuse,
    Step,
    Write,
    WriteLastWords,
)
from services.gateway.transport.deadlines import Deadlines
from shared.log import get_logger

if TYPE_CHECKING:
    from services.gateway.transport.open_connections import OpenConnections

log = get_logger()


class ClientConnection(asyncio.BufferedProtocol):
    """Hands a transport's events to the conversation, and performs its actions.

    `remote`: the listener accepts other hosts, so the client has rights only by its certificate or token.
    """

    __slots__ = (
        "_acting",
        "_by_us",
        "_handler",
        "_open",
        "_peer",
        "_reading",
        "_remote",
        "_transport",
        "conversation",
        "origin",
    )

    def __init__(self, connections: "OpenConnections", *, remote: bool = False) -> None:
        self._open = connections
        self._handler = connections.handler
        self._remote = remote
        self._acting = False
        self._reading = True
        self._by_us = False  # the connection ends because the gateway does

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Admit the connection, or refuse it when there are too many."""
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(WRITE_SIZE)
        self._peer = identify(self._transport, next(self._open.numbers), self._rights())
        self.origin = self._peer.origin
        settings, loop = self._open.settings, self._open.loop
        deadlines = Deadlines(settings, loop.time, introduced=bool(self._peer.rights.scopes))
        delay = partial(self._open.rate_limit.note_request, self.origin)
        self.conversation = Conversation(settings, deadlines, self.origin, delay)
        self._handler.add_connection(self._peer, self._push, self.drop)
        self._open.add(self)
        self.act()

    def _rights(self) -> Rights:
        if not self._remote:
            return HERE
        subject = common_name(self._transport.get_extra_info("peercert"))
        return self._handler.tokens.rights_of_certificate(subject)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        """Release all that lasted as long as the connection."""
        self._open.remove(self)
        self.conversation.drop()
        self._handler.remove_connection(self._peer, by_us=self._by_us)

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002
        """Return the buffer that the loop fills next."""
        return self._open.receive_buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Hand over the bytes that were read."""
        if not self.conversation.over:
            self._open.save_memory()
        self.conversation.receive(bytes(self._open.receive_buffer[:nbytes]))
        self.act()

    def eof_received(self) -> bool:
        """Answer the client's requests before its end; return whether the connection is still needed for that."""
        self.conversation.receive_end()
        self.act()
        return not self.conversation.over

    def pause_writing(self) -> None:
        """Note that the client is behind."""
        self.conversation.pause_writing()

    def resume_writing(self) -> None:
        """Go on writing."""
        self.conversation.resume_writing()
        self.act()

    def expire(self) -> None:
        """Act on a deadline that has passed."""
        self.conversation.expire(needed=self._handler.needs_connection(self._peer))
        self.act()

    @property
    def deadline(self) -> float:
        """The loop's time at which to call `expire`."""
        return self.conversation.deadlines.passes_at

    @property
    def holder(self) -> str:
        """The holder of its rights."""
        return self._peer.rights.holder

    @property
    def buffered(self) -> int:
        """Bytes that wait here, for the decoder or for the client to read them."""
        return self.conversation.buffered + self._transport.get_write_buffer_size()

    def refuse(self, refused: RequestError) -> None:
        """Answer with a refusal that answers no request."""
        self.conversation.refuse(refused)

    def drop(self) -> None:
        """Cut the connection, and release all that waits."""
        self.conversation.drop()
        self.act()

    def drain(self) -> None:
        """Begin no more requests, because the gateway ends; close once the answer under way, if any, is sent."""
        self._by_us = True
        self.conversation.drain()
        self.act()

    def abort(self) -> None:
        """Cut the connection, because the gateway ends."""
        self._by_us = True
        self._transport.abort()

    def act(self) -> None:
        """Perform the conversation's actions, until it waits for something.

        A fault of ours ends this connection alone: others may have led here.
        """
        if self._acting:
            return  # an action led here: the loop below goes on
        self._acting = True
        try:
            while (action := self.conversation.next_action()) is not None:
                if self._transport.is_closing() and action not in (Step.ABORT, Step.ABORT_SLOW):
                    break  # nothing arrives any more, but a transport may wait for ever for its buffer to empty
                self._perform(action)
        except Exception as error:
            self._end_for(error)
        finally:
            self._acting = False
        if self.conversation.reading is not self._reading and not self.conversation.ended:
            self._throttle()

    def _throttle(self) -> None:
        """Stop reading from a client that sends faster than it reads answers, or go on."""
        self._reading = self.conversation.reading
        if self._reading:
            self._transport.resume_reading()
        else:
            self._transport.pause_reading()

    def _perform(self, action: Action) -> None:
        if isinstance(action, Write):
            self._transport.write(action.data)
        elif isinstance(action, Handle | Refuse):
            if action.wait_seconds:
                self._handler.counters[REQUESTS_DELAYED] += 1
                self._open.loop.call_later(action.wait_seconds, self._answer, action)
            else:
                self._answer(action)
        elif isinstance(action, WriteLastWords):
            self._transport.write(b"".join(self._handler.refuse(action.refused)))
        elif action is Step.GIVE_WAY:
            self._open.loop.call_soon(self._take_turn)
        elif action is Step.HALF_CLOSE:
            self._half_close()
        elif action is Step.CLOSE:
            self._transport.close()
        else:
            self._handler.counters[TOO_SLOW] += action is Step.ABORT_SLOW
            self._transport.abort()

    def _answer(self, action: Handle | Refuse) -> None:
        if self.conversation.state is not ConversationState.ANSWERING or self._transport.is_closing():
            return  # the client has gone while its request waited
        if isinstance(action, Refuse):
            self._refuse(action.refused)
        else:
            self._handle(action.request)

    def _handle(self, request: Request) -> None:
        try:
            if isinstance(request, Auth):
                self._peer = self._handler.authenticate(request, self._peer)
                self.conversation.deadlines.introduce()
            self._handler.handle(request, self._peer, self._reply)
        except RequestError as refused:
            self._refuse(refused, None if isinstance(request, SignUp) else request.id)
        except Exception as error:
            self._end_for(error)

    def _end_for(self, error: Exception) -> None:
        """Cut the connection for a fault of ours; the others go on."""
        log.error("error while handling a request", peer=str(self._peer), reason=repr(error), exc_info=error)
        self.conversation.drop()
        self._transport.abort()

    def _reply(self, answer: Answer) -> None:
        self.conversation.answer(answer)
        self.act()

    def _refuse(self, refused: RequestError, id: Id | None = None) -> None:
        self.conversation.answer(self._handler.refuse(refused, id), closes=refused.closes)
        self.act()

    def _push(self, lines: bytes) -> None:
        self._open.save_memory()
        self.conversation.push(lines)
        self.act()

    def _take_turn(self) -> None:
        self.conversation.take_turn()
        self.act()

    def _half_close(self) -> None:
        with contextlib.suppress(OSError):  # the client has reset the connection
            self._transport.write_eof()
