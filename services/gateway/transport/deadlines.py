"""Deadlines of a connection, and the refusals `too_slow`. No I/O; the clock is handed in."""

import math
from collections.abc import Callable
from typing import Final

from services.gateway.protocol.requests import RequestError
from shared.settings.tables import Gateway

SILENT_SECONDS: Final = 0.2
"""A TLS connection is closed when nothing has come for this long after the last answer."""


class Deadlines:
    """The time that a client has for its present step; `passes_at` is the end of it.

    Until the client is `introduced`, by address, certificate or token, it has `request_seconds` in all. The time for
    which the gateway lets it wait is part of them.
    """

    __slots__ = ("_clock", "_closed_by", "_introduced_by", "_settings", "introduced", "passes_at")

    def __init__(self, settings: Gateway, clock: Callable[[], float], *, introduced: bool) -> None:
        self._settings = settings
        self._clock = clock
        self._introduced_by = clock() + settings.request_seconds
        self._closed_by = math.inf
        self.introduced = introduced
        self.passes_at = math.inf

    def await_first_byte(self) -> None:
        """Give the client the time that a connection may be idle."""
        self._limit(self._settings.idle_seconds)

    def await_last_byte(self) -> None:
        """Give the client the time that a request may take, from its first byte on."""
        self._limit(self._settings.request_seconds)

    def await_reader(self) -> None:
        """Give the client the time to read what was written."""
        self._limit(self._settings.request_seconds)

    def suspend(self) -> None:
        """Give the client any time: it waits for the gateway."""
        self._limit(math.inf)

    def _limit(self, seconds: float) -> None:
        self.passes_at = self._clock() + seconds
        if not self.introduced:
            self.passes_at = min(self.passes_at, self._introduced_by)

    def introduce(self) -> None:
        """Note that the client, whose request is under way, is introduced."""
        self.introduced = True
        self.suspend()

    def await_close(self) -> None:
        """Give the client the time to read the last words, and to close as well."""
        self._closed_by = self.passes_at = self._clock() + self._settings.request_seconds

    def await_silence(self) -> None:
        """Shorten the time after `await_close`: the client need only be silent for a moment."""
        self.passes_at = min(self._closed_by, self._clock() + SILENT_SECONDS)

    def end(self) -> None:
        """Limit nothing more: the connection is cut, or asyncio has a limit of its own."""
        self.passes_at = math.inf

    def too_slow(self, *, receiving: bool) -> RequestError:
        """Return the refusal of a client that has sent too little; `receiving`: its request has begun."""
        settings = self._settings
        if not self.introduced:
            why = f"no `auth` received within {settings.request_seconds:g} s"
        elif receiving:
            why = f"request not complete within {settings.request_seconds:g} s; send it in one piece"
        else:
            why = f"no request received within {settings.idle_seconds:g} s"
        return RequestError("too_slow", why, closes=True)


def too_slow_reader() -> RequestError:
    """Return the refusal of a client that reads events too slowly: it may go on from its last revision."""
    return RequestError(
        "too_slow",
        "events came faster than you read them; watch again from the last revision that you have",
        closes=True,
    )
