"""UDP sockets of this network namespace as the kernel lists them, in any process: sock_diag(7)."""

import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from shared.net.netlink_format import ENDS, KERNEL, NLM_F_DUMP, RECEIVE_SIZE, attributes, messages, request

NETLINK_SOCK_DIAG: Final = 4
SOCK_DIAG_BY_FAMILY: Final = 20
REQUEST: Final = struct.Struct("=BBBxI48x")
"""struct inet_diag_req_v2 (linux/inet_diag.h): family, protocol, extensions, states; and no filter."""
ANSWER: Final = struct.Struct("=4xHH16s16s32x")
"""struct inet_diag_msg: the ports, in network order, that a socket is bound and connected to, and the addresses."""
INET_DIAG_SKMEMINFO: Final = 7
MEMINFO: Final = struct.Struct("=4xI24xI")
"""Of nine u32: bytes of receive buffer, and datagrams dropped (linux/sock_diag.h)."""
ALL_STATES: Final = 0xFFFFFFFF
ANSWER_SECONDS: Final = 2.0


@dataclass(frozen=True, slots=True)
class UdpSocket:
    """The address of a socket, bytes of receive buffer as they were asked for, and datagrams dropped there.

    `peer` and `peer_port` are what it is connected to; of one that is not, the address and the port are 0.
    """

    address: str
    port: int
    peer: str
    peer_port: int
    receive_buffer: int
    dropped: int


def udp_sockets() -> list[UdpSocket]:
    """Return every UDP socket; none where the kernel does not tell."""
    found: list[UdpSocket] = []
    for family in (socket.AF_INET, socket.AF_INET6):
        with suppress(OSError, struct.error):
            found += _ask(family)
    return found


def _ask(family: int) -> Iterator[UdpSocket]:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, NETLINK_SOCK_DIAG) as questions:
        questions.settimeout(ANSWER_SECONDS)
        body = REQUEST.pack(family, socket.IPPROTO_UDP, 1 << INET_DIAG_SKMEMINFO - 1, ALL_STATES)
        questions.sendto(request(SOCK_DIAG_BY_FAMILY, NLM_F_DUMP, 1, body), KERNEL)
        while True:
            for kind, _, answer in messages(questions.recv(RECEIVE_SIZE)):
                if kind in ENDS:
                    return
                yield from parse_answer(family, answer)


def parse_answer(family: int, data: bytes) -> Iterator[UdpSocket]:
    """Yield the socket of a struct inet_diag_msg, unless it says nothing of memory. struct.error."""
    port, peer_port, packed, packed_peer = ANSWER.unpack_from(data)
    length = 4 if family == socket.AF_INET else 16
    address, peer = (socket.inet_ntop(family, each[:length]) for each in (packed, packed_peer))
    memory = attributes(data[ANSWER.size :]).get(INET_DIAG_SKMEMINFO)
    if memory is not None:
        buffer, dropped = MEMINFO.unpack_from(memory)
        # The kernel doubles the size that is asked for, for its own records.
        yield UdpSocket(address, socket.ntohs(port), peer, socket.ntohs(peer_port), buffer // 2, dropped)
