"""Lines pushed to a client, such as events of `watch`: they wait to be written, up to a limit. No I/O."""

from collections import deque


class PushQueue:
    """The lines that wait to be written to one client; `size` is their number of bytes."""

    __slots__ = ("_lines", "_most", "size")

    def __init__(self, most: int) -> None:
        self._lines: deque[bytes] = deque()
        self._most = most
        self.size = 0

    @property
    def too_many(self) -> bool:
        """Return whether more bytes wait than `[gateway] output_buffer` allows."""
        return self.size > self._most

    def append(self, lines: bytes) -> None:
        """Add whole lines."""
        self._lines.append(lines)
        self.size += len(lines)

    def pop(self) -> bytes:
        """Return the oldest lines, which wait no more."""
        lines = self._lines.popleft()
        self.size -= len(lines)
        return lines

    def clear(self) -> None:
        """Drop all that waits."""
        self._lines.clear()
        self.size = 0
