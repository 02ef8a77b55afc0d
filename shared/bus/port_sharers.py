"""Workers of other buses that listen at an address of ours: by SO_REUSEPORT each would get a part of what comes.

The kernel reports no error then, since the user is the same. A worker is known by the lock that it holds in its bus
directory (`shared.bus.loans`). Those that this process may not see, as in another container, are not found.
"""

import os
import re
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

from shared.net.addresses import Endpoint
from shared.net.port_holders import listening_sockets, processes

LOCK: Final = re.compile(r"(.+)/pool\.\d+\.lock( \(deleted\))?")


class Sharer(NamedTuple):
    """A worker of another bus: its process, and the directory of its bus."""

    pid: int
    directory: str


def workers_of_other_buses(endpoint: Endpoint, directory: Path, own: Iterable[socket.socket] = ()) -> list[Sharer]:
    """Return the workers that listen at an address of the endpoint, for another bus than that in `directory`.

    `own` are sockets of this process there.
    """
    known = {f"socket:[{os.fstat(sock.fileno()).st_ino}]" for sock in own}
    if endpoint.path or not (sockets := set(listening_sockets(endpoint)) - known):
        return []
    ours = os.path.realpath(directory)
    return [each for each in _workers(sockets) if each.directory != ours]


def _workers(sockets: set[str]) -> Iterator[Sharer]:
    """Yield the workers that have one of these sockets open."""
    for pid, opened in processes():
        if opened & sockets:
            yield from (Sharer(pid, lock[1]) for each in opened if (lock := LOCK.fullmatch(each)))
