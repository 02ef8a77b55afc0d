"""A client of the gateway, which says a JSON line at a time."""

import json
import socket
from typing import Any, Self


class Talk:
    """A connection to the gateway on which requests are made, and events come."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._lines = connection.makefile("rb")

    def tell(self, op: str, **fields: object) -> None:
        """Send a request; its answer is a line that comes."""
        self.connection.sendall(json.dumps({"op": op, **fields}).encode() + b"\n")

    def ask(self, op: str, **fields: object) -> dict[str, Any]:
        """Send a request, and return the next line."""
        self.tell(op, **fields)
        return self.read()

    def read(self) -> dict[str, Any]:
        """Return the next line."""
        line: dict[str, Any] = json.loads(self._lines.readline())
        return line

    def follow(self, until: int) -> list[dict[str, Any]]:
        """Return every event up to this revision."""
        events = [self.read()]
        while events[-1]["revision"] < until:
            events.append(self.read())
        return events

    def rest(self) -> bytes:
        """Return all that comes until the gateway closes."""
        return self._lines.read()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Go away."""
        self._lines.close()
        self.connection.close()


def talk_to(port: int = 5000) -> Talk:
    """Connect to a gateway of this host."""
    return Talk(socket.create_connection(("127.0.0.1", port), timeout=60))
