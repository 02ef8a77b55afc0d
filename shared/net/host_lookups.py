"""Lookups of host names, again and again, in threads of their own: getaddrinfo(3) may take a minute to give up."""

import socket
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Final

from shared.net.addresses import resolve

AT_ONCE: Final = 8
"""Threads: names beyond them wait until one ends."""
LATE_SECONDS: Final = 10.0
"""Time after which a name that is being looked up counts as one without an answer; what comes later is taken."""
RETRY_SECONDS: Final = 5.0
"""Time after which a name without an answer is looked up again, if it is not due sooner."""


@dataclass(slots=True)
class Host:
    """A name: the addresses of its last answer, best first (RFC 6724), and why the last lookup gave none, if so."""

    addresses: tuple[str, ...] = ()
    trouble: str = ""
    settled: bool = False
    """True once a lookup has ended, or is late."""
    due_at: float = 0.0
    began_at: float | None = None


_Answer = tuple[str, tuple[str, ...], str]
"""Name, addresses, trouble."""


class HostLookups:
    """Addresses of names, each looked up every `seconds`; nothing here waits for an answer."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._clock = clock
        self._hosts: dict[str, Host] = {}
        self._answers: SimpleQueue[_Answer] = SimpleQueue()
        self._running = 0

    @property
    def settled(self) -> bool:
        """True once each name has been looked up, or is late."""
        return all(host.settled for host in self._hosts.values())

    def follow(self, names: Iterable[str]) -> None:
        """Look up exactly these from now on; known ones keep their addresses."""
        self._hosts = {name: self._hosts.get(name) or Host() for name in names}

    def __getitem__(self, name: str) -> Host:
        return self._hosts.get(name) or Host()

    def tick(self) -> Collection[str]:
        """Take the answers that have come, begin what is due; return the names that were answered, or not in time."""
        told = {}
        while answer := self._next_answer():
            name, addresses, trouble = answer
            self._running -= 1
            if host := self._hosts.get(name):
                again = self._seconds if addresses else min(self._seconds, RETRY_SECONDS)
                host.addresses, host.trouble, host.settled = addresses or host.addresses, trouble, True
                host.began_at, host.due_at = None, self._clock() + again
                told[name] = host
        now = self._clock()
        for name, host in self._hosts.items():
            if host.began_at is None and now >= host.due_at and self._running < AT_ONCE:
                self._begin(name)
                host.began_at = now
            elif host.began_at is not None and now >= host.began_at + LATE_SECONDS and not host.trouble:
                host.trouble, host.settled = f"no answer within {LATE_SECONDS:.0f} s", True
                told[name] = host
        return told

    def _next_answer(self) -> _Answer | None:
        try:
            return self._answers.get_nowait()
        except Empty:
            return None

    def _begin(self, name: str) -> None:
        self._running += 1
        try:  # a daemon does not keep the process from ending
            Thread(target=self._look_up, args=(name,), name=f"look up {name}", daemon=True).start()
        except RuntimeError as error:  # as many as this process may have
            self._answers.put((name, (), str(error)))

    def _look_up(self, name: str) -> None:
        try:
            found = resolve(name, 0, socket.SOCK_DGRAM)
        except OSError as error:
            self._answers.put((name, (), error.strerror or str(error)))
        else:
            self._answers.put((name, tuple(dict.fromkeys(str(at[0]) for _, at in found)), ""))
