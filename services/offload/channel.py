"""The planner's requests and the applier's answers, each msgpack behind its length, on the socket pair between them."""

import errno
import os
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Annotated, Final, Literal, TypeVar

import msgspec
from msgspec import Meta

from services.offload.kernel_plan import MAX_REQUEST, KernelPlan
from shared.bus.bodies.packing import pack, unpack

LENGTH: Final = struct.Struct(">I")
CREDENTIALS: Final = struct.Struct("=iII")
"""struct ucred: process, user, group (unix(7)); the kernel fills it in."""
ANCILLARY: Final = socket.CMSG_SPACE(CREDENTIALS.size)
CHUNK: Final = 1 << 16
WAITS: Final = 10
"""Waits, each of a socket's time limit, after which the other end counts as one that does not answer. While this
process stands still, one of them passes at most: where a machine was paused, the other end has stood still with it."""

T = TypeVar("T", bound=msgspec.Struct)
Result = TypeVar("Result")


RequestKind = Literal["apply", "count", "reload"]


class Request(msgspec.Struct, array_like=True, frozen=True):
    """The planner's request: to apply a plan, to read the counters, or to read the settings again."""

    kind: RequestKind
    number: Annotated[int, Meta(ge=0, le=1 << 62)]
    plan: KernelPlan | None = None


class Answer(msgspec.Struct, array_like=True, frozen=True):
    """The applier's answer to the request of this number: `error` is empty when it was done.

    `counters` has number, packets and bytes of each counter.
    """

    number: int
    error: str = ""
    counters: tuple[tuple[int, int, int], ...] = ()


class ClosedError(Exception):
    """The other end is closed."""


class UnfitError(ValueError):
    """The other end has sent what it may not send; nothing more is read from it."""


def send(sock: socket.socket, body: msgspec.Struct) -> None:
    """Send a request or an answer. ClosedError when the other end is; OSError when it does not take it in time."""
    data = pack(body)
    left = memoryview(LENGTH.pack(len(data)) + data)
    try:
        while left:
            left = left[_wait_for(partial(sock.send, left)) :]
    except (BrokenPipeError, ConnectionResetError):
        raise ClosedError from None


def receive(sock: socket.socket, kind: type[T], sender: int = 0) -> T:
    """Receive a request or an answer; with `sender`, from that process alone. ClosedError, UnfitError."""
    (length,) = LENGTH.unpack(_read(sock, LENGTH.size, sender))
    if length > MAX_REQUEST:
        raise UnfitError(f"{length} bytes, more than {MAX_REQUEST}")
    data = _read(sock, length, sender)
    try:
        return unpack(data, kind)
    except (ValueError, msgspec.MsgspecError) as error:
        raise UnfitError(f"{type(error).__name__}: {error}") from None


def _read(sock: socket.socket, length: int, sender: int) -> bytes:
    """Read so many bytes, each piece from the process that may send: the kernel does not mix pieces of several."""
    data = bytearray()
    while len(data) < length:
        try:
            size = min(CHUNK, length - len(data))
            piece, ancillary, _, _ = _wait_for(partial(sock.recvmsg, size, ANCILLARY if sender else 0))
        except ConnectionResetError:
            raise ClosedError from None
        if not piece:
            raise ClosedError
        if sender:
            processes = [
                CREDENTIALS.unpack(value)[0]
                for level, kind, value in ancillary
                if (level, kind, len(value)) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS, CREDENTIALS.size)
            ]
            if processes != [sender]:
                raise UnfitError(f"sent by process {processes}, not by {sender}")
        data += piece
    return bytes(data)


def _wait_for(call: Callable[[], Result]) -> Result:
    """Call until the socket is ready. TimeoutError when it never was."""
    for _ in range(WAITS - 1):
        with suppress(TimeoutError):
            return call()
    return call()


def name_error(error: OSError) -> str:
    """Return an error's text, with the cure of the most likely one."""
    text = str(error.strerror or error)
    if error.errno == errno.EPERM and "table" in text:
        return f"{text}: the table fanwire belongs to another process, such as a second fanwire"
    return text if error.errno else os.strerror(errno.EIO)
