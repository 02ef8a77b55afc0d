"""Reads marks: by them the kernel's rules say which datagrams they have copied already (SO_RCVMARK, socket(7))."""

import contextlib
import socket
from collections import Counter
from collections.abc import Iterable
from typing import Final

import numpy as np

from shared.datagrams.batch import Generations
from shared.datagrams.mmsg import ReceiveArena
from shared.ledger.counters import MARK_BLIND, MARK_SOCKETS, MARKS_UNREAD
from shared.log import get_logger
from shared.settings.tables import Offload

SO_RCVMARK: Final = 75
SO_TIMESTAMP: Final = (29, 35, 37, 63, 64, 65)
SO_RXQ_OVFL: Final = 40
BEFORE_MARKS: Final = (*SO_TIMESTAMP, SO_RXQ_OVFL)
"""Options whose control messages come before the mark's, and would take its place. The program that passed an inherited
socket may have set them."""

log = get_logger()


class MarkReader:
    """Reads marks on the worker's UDP sockets, and counts in its `account` on how many it can."""

    def __init__(self, settings: Offload, account: Counter[str]) -> None:
        self._mask, self._shift = np.uint32(settings.mark_mask), np.uint32(settings.mark_shift)
        self._wanted = bool(settings.interfaces)
        self._account = account

    def begin(self, sock: socket.socket) -> bool:
        """Ask the kernel for the marks of a socket's datagrams; return whether it tells them.

        Nothing is asked where the settings let the kernel make no copies.
        """
        if not self._wanted or sock.family == socket.AF_UNIX:
            return False
        for option in BEFORE_MARKS:
            with contextlib.suppress(OSError):  # an older kernel
                sock.setsockopt(socket.SOL_SOCKET, option, 0)
        try:
            sock.setsockopt(socket.SOL_SOCKET, SO_RCVMARK, 1)
        except OSError as error:
            log.error(
                "can't read marks: the kernel makes no copies of what this listener receives; "
                "needs Linux 5.19, and from 6.1 to 6.15 CAP_NET_RAW on some",
                listen=str(sock.getsockname()),
                error=error.strerror,
            )
            return False
        return True

    def count_sockets(self, reading: Iterable[bool | None]) -> None:
        """Count on how many sockets marks are read, and on how many they can't be; None: it is no UDP socket."""
        if self._wanted:
            each = list(reading)
            self._account[MARK_SOCKETS], self._account[MARK_BLIND] = each.count(True), each.count(False)

    def generations(self, arena: ReceiveArena, count: int) -> Generations | None:
        """Return the generation of each received piece, uint16, shape (count,); None: the kernel has copied none."""
        marks, unread = arena.marks(count)
        if unread:
            self._account[MARKS_UNREAD] += unread
        marks &= self._mask
        return (marks >> self._shift).astype(np.uint16) if marks.any() else None
