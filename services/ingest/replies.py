"""Answers every datagram to its sender, as the documented server does."""

import socket
from collections import Counter
from typing import Final

import numpy as np
import numpy.typing as npt

from shared.datagrams.mmsg import IOVEC, ReceiveArena, send
from shared.ledger.counters import REPLIED, REPLY_FAILED

MAX_ATTEMPTS: Final = 16
"""Send calls a batch: each destination that the kernel refuses costs one, and forged sources may all be refused."""


class Replier:
    """Sends one fixed reply to the sources of a receive call, by sendmmsg on the listener's own socket."""

    def __init__(self, sock: socket.socket, reply: bytes, account: Counter[str]) -> None:
        self._socket = sock
        self._account = account
        self._reply = np.frombuffer(reply, np.uint8)
        self._iovec = np.array([(self._reply.ctypes.data, len(reply))], IOVEC)

    def reply(self, arena: ReceiveArena, count: int) -> None:
        """Answer the `count` datagrams that `arena` holds; nothing waits; replies that can't be sent are counted."""
        chosen = self._answerable(arena, count)
        headers = arena.headers[:count][chosen]
        headers["iov"], headers["iovlen"] = self._iovec.ctypes.data, 1
        for told in ("control", "controllen", "flags"):  # the mark of what came would be set on the reply, if allowed
            headers[told] = 0
        at = sent = 0
        for _ in range(MAX_ATTEMPTS):
            if at == len(headers):
                break
            taken, error = send(self._socket.fileno(), headers, at, len(headers))
            sent += taken
            at += taken + (error != 0)
        self._account[REPLIED] += sent
        self._account[REPLY_FAILED] += count - sent

    def refuse(self, count: int) -> None:
        """Count replies that are not sent."""
        self._account[REPLY_FAILED] += count

    def _answerable(self, arena: ReceiveArena, count: int) -> npt.NDArray[np.bool_]:
        """Return the senders that get an answer: not port 0, nor one that sent this same reply: that has no end."""
        chosen: npt.NDArray[np.bool_] = arena.names["port"][:count] != 0
        for index in np.flatnonzero(arena.lengths(count) == len(self._reply)).tolist():
            chosen[index] &= arena.payload(index, index + 1) != self._reply.tobytes()
        return chosen
