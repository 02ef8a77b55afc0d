"""Finds the end of each message in a TCP stream: octet count (RFC 6587, 3.4.1), newline or NUL (3.4.2), or close.

No I/O.
"""

import re
from typing import Final

from shared.datagrams.limits import MAX_DATAGRAM

OCTET_COUNT: Final = re.compile(rb"([1-9][0-9]{0,8}) <")
"""Digits are a count only before `<`, where a syslog message begins: a line of text may begin with a number."""
PERHAPS_COUNT: Final = re.compile(rb"[1-9][0-9]{0,8} ?")
ANY_COUNT: Final = re.compile(rb"(?:\A|[\n\0])[1-9][0-9]{0,8}(?: <| ?\Z)")
"""Without a match every message in the buffer ends at a newline or NUL."""
END: Final = re.compile(rb"[\n\0]")
MAX_PENDING: Final = MAX_DATAGRAM + len("999999999 \r")
"""Bytes that may wait for their end."""


class Framing:
    """One connection's bytes, cut into messages of 1 to 65,507 bytes.

    A longer one sets `overlong` and nothing more is cut: the bytes behind it can't be told apart from it.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self.overlong = False
        self.lost_bytes = 0
        """Bytes of the overlong message, and of those read behind it."""
        self.lost_behind = 0
        """Messages read behind it, as far as they can be told apart."""

    @property
    def unfinished(self) -> bool:
        """Return whether part of a message has come without its end."""
        return bool(self._buffer)

    def feed(self, data: bytes) -> list[bytes]:
        """Add bytes as they come; return the messages that they complete. Empty lines are none."""
        if self.overlong:
            return []
        self._buffer += data
        if not END.search(data) and not self._buffer[:1].isdigit():
            messages = []
        elif ANY_COUNT.search(self._buffer):
            messages = self._cut_counted()
        else:
            messages = self._cut_lines()
        self.overlong = self.overlong or len(self._buffer) > MAX_PENDING
        self.lost_bytes += len(self._buffer) * self.overlong
        return messages

    def _cut_lines(self) -> list[bytes]:
        """Cut at newlines and NULs alone: six times as fast as looking for a count before each message."""
        *lines, rest = bytes(self._buffer).replace(b"\0", b"\n").split(b"\n")
        self._buffer[:] = rest
        messages = [message for line in lines if (message := line.removesuffix(b"\r"))]
        for number, message in enumerate(messages):
            if len(message) > MAX_DATAGRAM:
                self.overlong = True
                self.lost_bytes = sum(map(len, messages[number:]))
                self.lost_behind = len(messages) - number - 1 + bool(rest)
                return messages[:number]
        return messages

    def _cut_counted(self) -> list[bytes]:
        messages, at = [], 0
        while not self.overlong and (found := self._next(at)) is not None:
            begin, end, at = found
            self.overlong = end - begin > MAX_DATAGRAM
            at = begin if self.overlong else at
            if begin < end and not self.overlong:
                messages.append(bytes(self._buffer[begin:end]))
        del self._buffer[:at]
        return messages

    def _next(self, at: int) -> tuple[int, int, int] | None:
        """Return begin and end of the message that starts at `at`, and the start of the next; None: not all there."""
        if counted := OCTET_COUNT.match(self._buffer, at):
            begin, size = counted.end() - 1, int(counted[1])
            here = begin + size <= len(self._buffer) or size > MAX_DATAGRAM
            return (begin, begin + size, begin + size) if here else None
        if PERHAPS_COUNT.fullmatch(self._buffer, at):
            return None
        ending = END.search(self._buffer, at)
        if ending is None:
            return None
        stop = ending.start()
        end = stop - 1 if stop > at and self._buffer[stop - 1] == 0x0D else stop
        return at, end, ending.end()

    def finish(self) -> list[bytes]:
        """Return the message that ends because its sender has closed, unless its count asks for more."""
        if self.overlong or OCTET_COUNT.match(self._buffer):
            return []
        rest, self._buffer = bytes(self._buffer), bytearray()
        self.overlong = len(rest) > MAX_DATAGRAM
        self.lost_bytes = len(rest) * self.overlong
        return [rest] if rest and not self.overlong else []
