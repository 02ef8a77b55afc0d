"""Lookups of host names, again and again, in threads of their own: getaddrinfo(3) may take a minute to give up."""

import math
import socket
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Final, TypeVar

from shared.net.addresses import resolve

T = TypeVar("T")
AT_ONCE: Final = 8
"""Threads: names beyond them wait until one is free."""
LATE_SECONDS: Final = 10.0
"""Time after which a name that is due counts as one without an answer; what comes later is taken."""
RETRY_SECONDS: Final = 5.0
"""Time after which a name without an answer is looked up again, if it is not due sooner."""
LOOK_SECONDS: Final = 0.01
"""Time between two looks for answers of one who waits for them."""


@dataclass(slots=True)
class Host:
    """A name: the addresses of its last answer, best first (RFC 6724), and why the last lookup gave none, if so."""

    addresses: tuple[str, ...] = ()
    trouble: str = ""
    settled: bool = False
    """True once a lookup has ended, or is late."""
    due_at: float = 0.0
    began_at: float | None = None


_Answer = tuple[str, tuple[str, ...], str] | None
"""Name, addresses, trouble; None: a thread has ended."""


class HostLookups:
    """Addresses of names, each looked up every `seconds`; nothing but `wait` waits for an answer."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._clock = clock
        self._hosts: dict[str, Host] = {}
        self._due: SimpleQueue[str] = SimpleQueue()
        self._answers: SimpleQueue[_Answer] = SimpleQueue()
        self._threads = 0

    @property
    def settled(self) -> bool:
        """True once each name has been looked up, or is late."""
        return all(host.settled for host in self._hosts.values())

    def follow(self, names: Iterable[str]) -> None:
        """Look up exactly these from now on; known ones keep their addresses."""
        self._hosts = {name: self._hosts.get(name) or Host() for name in names}

    def wait(self, patience_seconds: float) -> None:
        """Wait until `settled`, or for so long."""
        deadline = time.monotonic() + patience_seconds
        while not self.settled and time.monotonic() < deadline:
            self.tick()
            time.sleep(LOOK_SECONDS)

    def __getitem__(self, name: str) -> Host:
        return self._hosts.get(name) or Host()

    def tick(self) -> Collection[str]:
        """Take the answers that have come, begin what is due; return the names that were answered, or not in time."""
        told = self._take_answers()
        now = self._clock()
        for name, host in self._hosts.items():
            if host.began_at is None and now >= host.due_at:
                host.began_at = now
                self._due.put(name)
            elif host.began_at is not None and now >= host.began_at + LATE_SECONDS and not host.trouble:
                host.trouble, host.settled = f"no answer within {LATE_SECONDS:.0f} s", True
                told.append(name)
        with suppress(RuntimeError):  # as many threads as this process may have: at a later call
            for _ in range(min(AT_ONCE - self._threads, self._due.qsize())):
                Thread(target=self._look_up, name="host lookups", daemon=True).start()  # not waited for at the end
                self._threads += 1
        return told

    def _take_answers(self) -> list[str]:
        told = []
        for answer in _emptied(self._answers):
            if answer is None:
                self._threads -= 1
                continue
            name, addresses, trouble = answer
            if host := self._hosts.get(name):
                again = self._seconds if addresses else min(self._seconds, RETRY_SECONDS)
                host.addresses, host.trouble, host.settled = addresses or host.addresses, trouble, True
                host.began_at, host.due_at = None, self._clock() + again
                told.append(name)
        return told

    def _look_up(self) -> None:
        for name in _emptied(self._due):
            try:
                found = resolve(name, 0, socket.SOCK_DGRAM, None)
            except OSError as error:
                self._answers.put((name, (), error.strerror or str(error)))
            else:
                self._answers.put((name, tuple(dict.fromkeys(str(at[0]) for _, at in found)), ""))
        self._answers.put(None)


def look_up(names: Iterable[str], patience_seconds: float) -> dict[str, Host]:
    """Look up each name once; what is not `settled` after that time in seconds has got no answer yet."""
    lookups, asked = HostLookups(math.inf), set(names)
    lookups.follow(asked)
    lookups.wait(patience_seconds)
    return {name: lookups[name] for name in asked}


def _emptied(queue: SimpleQueue[T]) -> Iterator[T]:
    """Yield what is in the queue until nothing is."""
    with suppress(Empty):
        while True:
            yield queue.get_nowait()
