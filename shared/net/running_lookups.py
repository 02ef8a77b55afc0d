"""Lookups of host names that are waited for together: getaddrinfo(3) can't be told how long to wait.

Each name is asked for once at a time, in a thread. A caller that asks for one under way waits for the rest of its time.
So names that are begun together have one bound, and a resolver that is silent is waited for once, also where it gives
up before that.
"""

import socket
import time
from collections.abc import Sequence
from threading import Event, Thread
from typing import Any, Final

Found = Sequence[tuple[socket.AddressFamily, socket.SocketKind, int, str, Any]]
FRESH_SECONDS: Final = 10.0
"""Time for which the answer to a lookup that was begun ahead may be used, and a failure that was waited for."""
SLOW_SECONDS: Final = 1.0
"""A resolver that takes so long to fail has waited for servers without an answer."""


class RunningLookup:
    """A name that is being looked up. OSError: no thread can be started for it."""

    def __init__(self, host: str) -> None:
        self.began_at = self.ended_at = time.monotonic()
        self.answered = Event()
        self._found: Found | Exception = ()
        try:
            Thread(target=self._ask, args=(host,), name="host lookup", daemon=True).start()  # not waited for at the end
        except RuntimeError as error:
            raise socket.gaierror(socket.EAI_AGAIN, f"it is not looked up: {error}") from None

    def _ask(self, host: str) -> None:
        try:
            self._found = socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM)
        except (OSError, ValueError) as error:
            self._found = error
        self.ended_at = time.monotonic()
        self.answered.set()

    @property
    def usable(self) -> bool:
        """Return whether its answer is still to come, or has come just now."""
        return not self.answered.is_set() or time.monotonic() < self.ended_at + FRESH_SECONDS

    @property
    def given_up(self) -> bool:
        """Return whether the resolver has failed after a while: to ask again would take as long."""
        return isinstance(self._found, Exception) and self.ended_at >= self.began_at + SLOW_SECONDS

    def result(self, seconds: float) -> Found:
        """Return the answer. OSError, ValueError: what it says, or that there is none for so long since it began."""
        if not self.answered.wait(max(0.0, self.began_at + seconds - time.monotonic())):
            raise socket.gaierror(socket.EAI_AGAIN, f"no answer within {seconds:g} s")
        if isinstance(self._found, Exception):
            raise self._found
        return self._found


_running: Final[dict[str, RunningLookup]] = {}


def begin_lookup(host: str) -> RunningLookup:
    """Look a name up, unless that is under way."""
    known = _running.get(host)
    if known is None or not known.usable:
        known = _running[host] = RunningLookup(host)
    return known


def wait_for_lookup(host: str, seconds: float) -> Found:
    """Return what a lookup has found, begun now or before; the next one asks anew, unless the resolver has given up.

    Errors as of `result`.
    """
    lookup = begin_lookup(host)
    try:
        return lookup.result(seconds)
    finally:
        if lookup.answered.is_set() and not lookup.given_up:
            _running.pop(host, None)
