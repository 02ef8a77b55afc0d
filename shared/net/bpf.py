"""Small programs by which the kernel decides about each datagram before a socket gets it: classic BPF, socket(7)."""

import ctypes
import socket
import struct
from collections.abc import Sequence
from typing import Final

SO_ATTACH_FILTER: Final = 26
SO_ATTACH_REUSEPORT_CBPF: Final = 51
"""asm-generic/socket.h; the module has no names for them."""
INSTRUCTION: Final = struct.Struct("=HBBI")
"""struct sock_filter: code, two jumps, operand (linux/filter.h)."""
NETWORK_HEADER: Final = 0x1_0000_0000 - 0x10_0000
"""SKF_NET_OFF: from here on the operand of a load counts from the start of the IP header."""
LOAD_WORD, LOAD_BYTE, SHIFT_RIGHT, JUMP_IF_EQUAL, VERDICT = 0x20, 0x30, 0x74, 0x15, 0x06
ALL_OF_IT: Final = 0xFFFFFFFF
"""A verdict is the number of bytes of the datagram that the socket gets; 0 drops it, and the socket counts it."""

Instruction = tuple[int, int, int, int]

NOTHING: Final = [(VERDICT, 0, 0, 0)]
NONE_MAPPED: Final = [
    (LOAD_BYTE, 0, 0, NETWORK_HEADER),
    (SHIFT_RIGHT, 0, 0, 4),
    (JUMP_IF_EQUAL, 0, 6, 6),
    (LOAD_WORD, 0, 0, NETWORK_HEADER + 8),
    (JUMP_IF_EQUAL, 0, 4, 0),
    (LOAD_WORD, 0, 0, NETWORK_HEADER + 12),
    (JUMP_IF_EQUAL, 0, 2, 0),
    (LOAD_WORD, 0, 0, NETWORK_HEADER + 16),
    (JUMP_IF_EQUAL, 1, 0, 0xFFFF),
    (VERDICT, 0, 0, ALL_OF_IT),
    (VERDICT, 0, 0, 0),
]
"""Drops datagrams that came by IPv6 from ::ffff:0:0/96."""


def attach(sock: socket.socket, program: Sequence[Instruction], option: int = SO_ATTACH_FILTER) -> None:
    """Attach a program to a socket, in place of the one before. OSError when the kernel refuses it."""
    code = ctypes.create_string_buffer(b"".join(INSTRUCTION.pack(*each) for each in program))
    # struct sock_fprog; the kernel copies the program that it points to.
    sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("@HP", len(program), ctypes.addressof(code)))


def refuse_input(sock: socket.socket) -> None:
    """Let the kernel drop, and count among its drops, all that arrives from now on; queued datagrams stay."""
    attach(sock, NOTHING)


def refuse_mapped_sources(sock: socket.socket) -> None:
    """Drop datagrams over IPv6 that claim an IPv4 source: they would pass for ones that came over IPv4."""
    attach(sock, NONE_MAPPED)
