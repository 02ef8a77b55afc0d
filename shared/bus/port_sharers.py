"""Workers of other buses that listen at an address of ours: by SO_REUSEPORT each would get a part of what comes.

The kernel reports no error then, since the user is the same. A worker is known by the lock that it holds in its bus
directory (`shared.bus.loans`). Those that this process may not see, as in another container, are not found.
"""

import ipaddress
import os
import re
import socket
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

from shared.net.addresses import Endpoint
from shared.net.sockets import KINDS

TABLES: Final = {"udp": (("udp", "udp6"), "07"), "tcp": (("tcp", "tcp6"), "0A")}
"""By scheme: files of /proc/net, and the state of a socket there that listens (net/tcp_states.h)."""
LOCK: Final = re.compile(r"(.+)/pool\.\d+\.lock( \(deleted\))?")
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class Sharer(NamedTuple):
    """A worker of another bus: its process, and the directory of its bus."""

    pid: int
    directory: str


def workers_of_other_buses(endpoint: Endpoint, directory: Path, own: Iterable[socket.socket] = ()) -> list[Sharer]:
    """Return the workers that listen at an address of the endpoint, for another bus than that in `directory`.

    `own` are sockets of this process there.
    """
    known = {f"socket:[{os.fstat(sock.fileno()).st_ino}]" for sock in own}
    if endpoint.scheme not in TABLES or not (sockets := set(_listening(endpoint)) - known):
        return []
    ours = os.path.realpath(directory)
    return [each for each in _workers(sockets) if each.directory != ours]


def _listening(endpoint: Endpoint) -> Iterator[str]:
    """Yield the sockets, as in `socket:[4026]`, that listen where the endpoint does."""
    wanted: set[Address] = set()
    with suppress(OSError):
        found = endpoint.addresses(KINDS[endpoint.scheme])
        wanted = {ipaddress.ip_address(str(at[0]).partition("%")[0]) for _, at in found}
    names, state = TABLES[endpoint.scheme]
    for path in (Path("/proc/self/net", name) for name in names):
        for line in path.read_text().splitlines()[1:] if path.exists() else ():
            words = line.split()
            place, _, port = words[1].partition(":")
            if (words[3], int(port, 16)) == (state, endpoint.port) and any(
                _overlap(_parse(place), at) for at in wanted
            ):
                yield f"socket:[{words[9]}]"


def _parse(text: str) -> Address:
    """Parse an address as these files have it: 32-bit words in the host's order."""
    words = (int(text[at : at + 8], 16).to_bytes(4, sys.byteorder) for at in range(0, len(text), 8))
    return ipaddress.ip_address(b"".join(words))


def _overlap(one: Address, other: Address) -> bool:
    """Return whether a datagram may be for both: [::] is dual-stack."""
    return one == other or any(
        not int(some) and some.version in (each.version, 6) for some, each in ((one, other), (other, one))
    )


def _workers(sockets: set[str]) -> Iterator[Sharer]:
    """Yield the workers that have one of these sockets open. Processes of other network namespaces have none."""
    network = Path("/proc/self/ns/net").stat().st_ino
    for entry in Path("/proc").iterdir():
        opened = set(_opened(entry, network)) if entry.name.isdigit() else set()
        if opened & sockets:
            yield from (Sharer(int(entry.name), lock[1]) for each in opened if (lock := LOCK.fullmatch(each)))


def _opened(process: Path, network: int) -> Iterator[str]:
    """Yield what a process in this network namespace has open; nothing where it has ended, or is another user's."""
    with suppress(OSError):
        for each in (process / "fd").iterdir() if (process / "ns" / "net").stat().st_ino == network else ():
            with suppress(OSError):
                yield str(each.readlink())
