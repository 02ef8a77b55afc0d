"""Capabilities of this thread, and those that the programs it starts keep: capabilities(7)."""

import ctypes
import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

EVERYTHING: Final = (1 << 64) - 1  # sets of capabilities, see linux/capability.h
NET_ADMIN: Final = 1 << 12
NET_RAW: Final = 1 << 13
CAPABILITY_VERSION_3: Final = 0x20080522
PR_SET_SECUREBITS, PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, SECBIT_NOROOT = 28, 47, 2, 1  # linux/prctl.h

_libc = ctypes.CDLL(None, use_errno=True)


def check(result: int) -> int:
    """Return the result of a function of the C library; OSError with its errno where it failed."""
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def raise_ambient(kept: int = EVERYTHING) -> int:
    """Let programs keep those of this thread's capabilities that are in `kept`; return what they kept before.

    A user who is not root loses them at exec(2) unless they are inheritable and ambient, see capabilities(7); root gets
    all of them, unless SECBIT_NOROOT says that root is a user like others. Also for preexec_fn.
    """
    permitted, before = _capabilities()
    _set_capabilities(permitted, permitted & kept)  # what is no longer inheritable is no longer ambient
    for number in range(64):
        if permitted & kept & 1 << number:
            check(_libc.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, number, 0, 0))
    if os.geteuid() == 0 and NET_RAW in (kept, before):
        check(_libc.prctl(PR_SET_SECUREBITS, SECBIT_NOROOT if kept == NET_RAW else 0, 0, 0, 0))
    return before


def keep_only(kept: int) -> None:
    """Give up all capabilities but those in `kept`, as a program begins for which these were ambient."""
    raise_ambient(kept)
    _set_capabilities(_capabilities()[0] & kept, kept)


def _header() -> Any:
    return (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)


def _capabilities() -> tuple[int, int]:
    """Return the permitted and the inheritable ones of this thread."""
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable: the low words, then the high ones
    check(_libc.capget(_header(), sets))
    return sets[1] | sets[4] << 32, sets[2] | sets[5] << 32


def _set_capabilities(permitted: int, inheritable: int) -> None:
    sets = (permitted, permitted, inheritable)
    words = (ctypes.c_uint32 * 6)(*(each & 0xFFFFFFFF for each in sets), *(each >> 32 for each in sets))
    check(_libc.capset(_header(), words))


with_net_raw = partial(raise_ambient, NET_RAW)
"""For preexec_fn: the program has CAP_NET_RAW and no other capability, as under systemd's AmbientCapabilities."""


@contextmanager
def ambient(kept: int = EVERYTHING) -> Iterator[None]:
    """Programs that this thread starts meanwhile have those of its capabilities."""
    before = raise_ambient(kept)
    try:
        yield
    finally:
        raise_ambient(before)


@contextmanager
def held_by_a_program(*sockets: socket.socket) -> Iterator[int]:
    """Let a program that is not privileged have these sockets, and nobody else; return its number.

    What a user's own services have open, another process of that user sees, unless it holds more capabilities.
    """
    with subprocess.Popen(["sleep", "infinity"], pass_fds=[sock.fileno() for sock in sockets]) as program:
        for sock in sockets:
            sock.close()
        try:
            yield program.pid
        finally:
            program.kill()
