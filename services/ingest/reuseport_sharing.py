"""Shares a worker's sockets: several workers bind one address, and a program picks the one that gets a datagram.

The kernel runs one small program for all sockets that share an address by SO_REUSEPORT (SO_ATTACH_REUSEPORT_CBPF,
socket(7)). The program has to know the number of sockets, and workers come and go: each counts them once a second.
Until then the kernel spreads the datagrams of a worker that is gone by addresses and ports.
"""

import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import Final

from shared.log import get_logger
from shared.net.addresses import Endpoint
from shared.net.bpf import (
    JUMP_IF_EQUAL,
    LOAD_BYTE,
    LOAD_WORD,
    NETWORK_HEADER,
    SHIFT_RIGHT,
    SO_ATTACH_REUSEPORT_CBPF,
    Instruction,
    attach,
)
from shared.net.multicast import is_multicast
from shared.settings.tables import Spread

RANDOM: Final = 0x1_0000_0000 - 0x1000 + 56
"""SKF_AD_OFF + SKF_AD_RANDOM: loading it gives a random number."""
MULTIPLIER: Final = 0x9E37_79B1
"""2**32 divided by the golden ratio: neighbouring addresses end far apart (Knuth, multiplicative hashing)."""

SO_DETACH_REUSEPORT_BPF: Final = 68
"""asm-generic/socket.h"""
DISCARD_PORT: Final = 9
"""RFC 863. Nothing is sent there, and nothing comes from there."""
HERE: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""An address to connect to where a socket is bound to all of them."""
NOT_CONNECTED: Final = "07"
"""The state of an unconnected UDP socket in /proc/net/udp (TCP_CLOSE)."""

STORE_IN_X, MULTIPLY, MODULO, XOR_WITH_X, JUMP, RETURN = 0x07, 0x24, 0x94, 0xAC, 0x05, 0x16

log = get_logger()


def _load(offset: int) -> Instruction:
    return LOAD_WORD, 0, 0, NETWORK_HEADER + offset


def share_port(sock: socket.socket) -> None:
    """Let other workers bind the same address; for TCP, let a successor bind it at once."""
    if sock.family != socket.AF_UNIX:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(sock.type == socket.SOCK_STREAM))


def leave_to_others(sock: socket.socket) -> bool:
    """Let workers that share a UDP socket's address get its datagrams from now on; return whether there are any.

    A connected socket gets what its peer sends, so the kernel chooses among the others (udp_lib_lookup). Queued
    datagrams stay. The program goes, as it would still choose this socket: the others attach theirs again when they see
    that it is closed.
    """
    if sock.family == socket.AF_UNIX or not sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT):
        return False
    address = _local_address(sock)
    places = [line.split(None, 4) for name in ("udp", "udp6") for line in _lines(name)]
    if sum(local == address and state == NOT_CONNECTED for _, local, _, state, _ in places) < 2:
        return False
    host = sock.getsockname()[0]
    try:
        sock.connect((HERE.get(host, host), DISCARD_PORT))
    except OSError:
        return False
    with suppress(OSError):  # there is none
        sock.setsockopt(socket.SOL_SOCKET, SO_DETACH_REUSEPORT_BPF, 0)
    return True


def is_shareable(endpoint: Endpoint) -> bool:
    """Return whether several workers can listen there, each for a share of the datagrams.

    A path has one socket. The kernel gives a multicast datagram to each socket of the group, not to one.
    """
    return not endpoint.path and not is_multicast(endpoint.host)


def program(spread: Spread, workers: int) -> list[Instruction]:
    """Return a program that picks one of `workers` for a datagram: its place among those that share the address."""
    if spread == "datagram":
        choice = [(LOAD_WORD, 0, 0, RANDOM)]
    else:
        ipv6 = [_load(8)]
        for offset in (12, 16, 20):
            ipv6 += [(STORE_IN_X, 0, 0, 0), _load(offset), (XOR_WITH_X, 0, 0, 0)]
        choice = [
            (LOAD_BYTE, 0, 0, NETWORK_HEADER),
            (SHIFT_RIGHT, 0, 0, 4),
            (JUMP_IF_EQUAL, 2, 0, 6),
            _load(12),
            (JUMP, 0, 0, len(ipv6)),
            *ipv6,
            (MULTIPLY, 0, 0, MULTIPLIER),
            (SHIFT_RIGHT, 0, 0, 16),
        ]
    return [*choice, (MODULO, 0, 0, workers), (RETURN, 0, 0, 0)]


def _local_address(sock: socket.socket) -> str:
    """Return a socket's address as /proc/net/udp and udp6 write it: 32-bit words in the host's order, then the port."""
    host, port = sock.getsockname()[:2]
    packed = socket.inet_pton(sock.family, host.partition("%")[0])
    words = (int.from_bytes(packed[at : at + 4], sys.byteorder) for at in range(0, len(packed), 4))
    return "".join(f"{word:08X}" for word in words) + f":{port:04X}"


class Spreader:
    """Keeps the programs of a worker's UDP sockets up to date; call `renew` once a second."""

    def __init__(self, spread: Spread) -> None:
        self._spread = spread
        self._sockets: list[tuple[socket.socket, str]] = []
        self._workers: dict[socket.socket, int] = {}

    def add(self, sock: socket.socket) -> None:
        """Add a bound socket, if others may share its address and the kernel is not to choose by itself."""
        shared = sock.family != socket.AF_UNIX and sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT)
        if shared and self._spread != "flow":
            self._sockets.append((sock, _local_address(sock)))

    def remove(self, sock: socket.socket) -> None:
        """Forget a socket that will be closed."""
        self._sockets = [(each, address) for each, address in self._sockets if each is not sock]
        self._workers.pop(sock, None)

    def renew(self) -> None:
        """Count the workers at each address, and give the kernel a new program where the number has changed."""
        if not self._sockets:
            return
        found = [line.split(None, 2)[1] for name in ("udp", "udp6") for line in _lines(name)]
        for sock, address in self._sockets:
            workers = found.count(address)
            if workers and workers != self._workers.get(sock):
                self._workers[sock] = workers
                try:
                    attach(sock, program(self._spread, workers), SO_ATTACH_REUSEPORT_CBPF)
                except OSError as error:
                    log.warning(
                        "this kernel refuses the [ingest] spread that is asked for: it spreads by addresses and ports",
                        asked=self._spread,
                        error=error.strerror,
                    )


def _lines(name: str) -> list[str]:
    path = Path("/proc/self/net", name)
    return path.read_text().splitlines()[1:] if path.exists() else []  # no udp6 where IPv6 is switched off
