"""Finds the end of each message in a TCP stream: octet count (RFC 6587, 3.4.1), newline or NUL (3.4.2), or close.

No I/O.
"""

import re
from typing import Final

from shared.datagrams.limits import MAX_DATAGRAM

OCTET_COUNT: Final = re.compile(rb"([1-9][0-9]{0,8}) <")
"""Digits are a count only before `<`, where a syslog message begins: a line of text may begin with a number."""
PERHAPS_COUNT: Final = re.compile(rb"[1-9][0-9]{0,8} ?")
NEXT_COUNT: Final = re.compile(rb"[\n\0](?=[1-9][0-9]{0,8}(?: <| ?\Z))")
"""The end of a text that something follows which is a count, or may be the beginning of one."""
END: Final = re.compile(rb"[\n\0]")
EMPTY: Final = re.compile(rb"(?:\r?[\n\0])++")
"""Ends of messages that have no bytes."""
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
        messages = self._cut() if self._may_end(data) else []
        self.overlong = self.overlong or len(self._buffer) > MAX_PENDING
        self.lost_bytes += len(self._buffer) * self.overlong
        return messages

    def _may_end(self, data: bytes) -> bool:
        """Return whether the last bytes may end a message: a long one is not looked at again for each piece of it."""
        if counted := OCTET_COUNT.match(self._buffer):
            size = int(counted[1])
            return counted.end() - 1 + size <= len(self._buffer) or size > MAX_DATAGRAM
        return END.search(data) is not None

    def _cut(self) -> list[bytes]:
        messages: list[bytes] = []
        data, at = bytes(self._buffer), 0
        while not self.overlong:
            if counted := OCTET_COUNT.match(data, at):
                begin, size = counted.end() - 1, int(counted[1])
                if size > MAX_DATAGRAM:
                    self.overlong, at = True, begin
                elif (end := begin + size) <= len(data):
                    messages.append(data[begin:end])
                    at = end
                else:
                    break
            elif empty := EMPTY.match(data, at):
                at = empty.end()
            else:
                following = None if PERHAPS_COUNT.fullmatch(data, at) else NEXT_COUNT.search(data, at)
                stop = following.end() if following else 1 + max(data.rfind(b"\n", at), data.rfind(b"\0", at))
                if stop <= at:
                    break
                messages += self._lines(data[at:stop], more=stop < len(data))
                at = stop
        del self._buffer[:at]
        return messages

    def _lines(self, text: bytes, *, more: bool) -> list[bytes]:
        """Return the messages of a text without counts, that ends at an end; tell of the overlong; `more` follows."""
        lines = text.replace(b"\0", b"\n").split(b"\n")
        messages = [message for line in lines if (message := line.removesuffix(b"\r"))]
        for number, message in enumerate(messages):
            if len(message) > MAX_DATAGRAM:
                self.overlong = True
                self.lost_bytes = sum(map(len, messages[number:]))
                self.lost_behind = len(messages) - number - 1 + more
                return messages[:number]
        return messages

    def finish(self) -> list[bytes]:
        """Return the message that ends because its sender has closed, unless its count asks for more."""
        if self.overlong or OCTET_COUNT.match(self._buffer):
            return []
        rest, self._buffer = bytes(self._buffer), bytearray()
        self.overlong = len(rest) > MAX_DATAGRAM
        self.lost_bytes = len(rest) * self.overlong
        return [rest] if rest and not self.overlong else []
