"""Threads beside a test, which run until they are told to stop."""

import socket
import threading
from abc import ABC, abstractmethod
from contextlib import suppress
from typing import Any


class Background(threading.Thread):
    """Runs until told to stop; its `run` looks at `stopping` now and then."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.stopping = threading.Event()

    def stop(self) -> None:
        """Stop, and wait for the end, if it runs at all."""
        self.stopping.set()
        if self.ident is not None:
            self.join()


class Reading(Background, ABC):
    """Takes what comes to a socket."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__()
        self.socket = sock
        sock.settimeout(0.1)

    def run(self) -> None:
        """Read until told to stop."""
        while not self.stopping.is_set():
            with suppress(TimeoutError):
                self.take(*self.socket.recvfrom(1 << 16))

    @abstractmethod
    def take(self, payload: bytes, peer: Any) -> None:
        """Take a datagram, and the address that it came from."""

    def close(self) -> None:
        """Stop, and close the socket."""
        self.stop()
        self.socket.close()
