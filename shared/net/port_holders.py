"""Processes that listen at a port, as /proc tells. Those of other users, or in another container, are not seen."""

import errno
import ipaddress
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

from shared.net.addresses import Endpoint
from shared.net.sockets import KINDS

TABLES: Final = {socket.SOCK_DGRAM: (("udp", "udp6"), "07"), socket.SOCK_STREAM: (("tcp", "tcp6"), "0A")}
"""By kind: files of /proc/net, and the state of a socket there that listens (net/tcp_states.h)."""
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def explain_bind(error: OSError, endpoint: Endpoint, setting: str) -> str:
    """Return the reason why a stream socket can't be bound, and the cure; `setting` names the address."""
    if error.errno != errno.EADDRINUSE:
        return f"{error.strerror}; set another {setting}"
    pid, name = holder(endpoint)
    if pid == os.getpid():
        return f"{setting} has this address twice; remove one of them"
    if pid:
        return f"in use by process {pid} ({name}); stop that, or set another {setting}"
    return f"in use; see by which process with `ss -ltnp` (`ss -lxp` for a path), or set another {setting}"


def holder(endpoint: Endpoint) -> tuple[int, str]:
    """Return number and name of a process that listens where the endpoint does; 0 where none is seen."""
    found = set() if endpoint.path else set(listening_sockets(endpoint))
    pid = next((pid for pid, opened in processes() if found & opened), 0) if found else 0
    return pid, _name(pid)


def listening_sockets(endpoint: Endpoint) -> Iterator[str]:
    """Yield the sockets, as in `socket:[4026]`, that listen where the endpoint does."""
    wanted: set[Address] = set()
    kind = KINDS[endpoint.scheme]
    with suppress(OSError):
        found = endpoint.addresses(kind)
        wanted = {ipaddress.ip_address(str(at[0]).partition("%")[0]) for _, at in found}
    names, state = TABLES[kind]
    for path in (Path("/proc/self/net", name) for name in names):
        for line in path.read_text().splitlines()[1:] if path.exists() else ():
            words = line.split()
            place, _, port = words[1].partition(":")
            if (words[3], int(port, 16)) == (state, endpoint.port) and any(
                _overlap(_parse(place), at) for at in wanted
            ):
                yield f"socket:[{words[9]}]"


def processes() -> Iterator[tuple[int, set[str]]]:
    """Yield each process of this network namespace with what it has open; others have none of its sockets.

    Nothing is seen of one that has ended, or is another user's.
    """
    network = Path("/proc/self/ns/net").stat().st_ino
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            yield int(entry.name), set(_opened(entry, network))


def _parse(text: str) -> Address:
    """Parse an address as these files have it: 32-bit words in the host's order."""
    words = (int(text[at : at + 8], 16).to_bytes(4, sys.byteorder) for at in range(0, len(text), 8))
    return ipaddress.ip_address(b"".join(words))


def _overlap(one: Address, other: Address) -> bool:
    """Return whether a datagram may be for both: [::] is dual-stack."""
    return one == other or any(
        not int(some) and some.version in (each.version, 6) for some, each in ((one, other), (other, one))
    )


def _opened(process: Path, network: int) -> Iterator[str]:
    with suppress(OSError):
        for each in (process / "fd").iterdir() if (process / "ns" / "net").stat().st_ino == network else ():
            with suppress(OSError):
                yield str(each.readlink())


def _name(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().rstrip()
    return "ended now"
