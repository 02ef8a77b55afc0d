"""Privileges given up for good, by a process that has opened what it needs: capabilities(7), prctl(2).

Standard library alone: openers use it while they have privileges to give up.
"""

import ctypes
import errno
import os
import resource
import struct
from contextlib import suppress
from pathlib import Path
from typing import Final

SETS: Final = ("CapInh", "CapPrm", "CapEff", "CapAmb")
"""The capabilities that a thread holds or hands on, as /proc/PID/status names them; CapBnd only limits them."""
PR_SET_DUMPABLE: Final = 4
PR_CAPBSET_DROP: Final = 24
PR_SET_KEEPCAPS: Final = 8
PR_SET_NO_NEW_PRIVS: Final = 38
PR_CAP_AMBIENT: Final = 47
PR_CAP_AMBIENT_RAISE: Final = 2
CAP_SETPCAP: Final = 8
CAP_NET_ADMIN: Final = 12
THIS_THREAD: Final = struct.pack("=Ii", 0x20080522, 0)
"""Version 3 of capset(2)."""
CAPABILITIES: Final = struct.Struct("=6I")
"""The effective, permitted and inheritable set: the lower 32 bits of each, then the upper ones."""

_libc: Final = ctypes.CDLL(None, use_errno=True)


def relinquish(become: tuple[str, int, int] | None, keep: int = 0) -> None:
    """Give up every privilege, each step while it still can; `become` is name, uid and gid. OSError.

    `keep` is the set of capabilities to keep, over an exec too.
    """
    harden()
    if int(own_status()["CapEff"], 16) >> CAP_SETPCAP & 1:
        _empty_bounding_set(keep)
    if keep:
        _prctl(PR_SET_KEEPCAPS, 1)
    with suppress(PermissionError):  # a plain user keeps its groups; in a user namespace root may have to
        os.setgroups([])
    if become:
        _, uid, gid = become
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
    # The ambient set follows the others (capabilities(7)).
    if _libc.capset(THIS_THREAD, CAPABILITIES.pack(*(keep & 0xFFFFFFFF,) * 3, *(keep >> 32,) * 3)):
        raise OSError(ctypes.get_errno(), "capset(2) was refused")
    for capability in (number for number in range(64) if keep >> number & 1):
        _prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, capability)
    _prctl(PR_SET_NO_NEW_PRIVS, 1)


def _empty_bounding_set(keep: int) -> None:
    for capability in (number for number in range(64) if not keep >> number & 1):
        try:
            _prctl(PR_CAPBSET_DROP, capability)
        except OSError as error:
            if error.errno == errno.EINVAL:  # the first that this kernel does not know
                return
            raise


def harden() -> None:
    """Deny access to others of this user: no core dump, no ptrace(2), no pidfd_getfd(2). Repeat it after each exec."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _prctl(PR_SET_DUMPABLE, 0)


def own_status() -> dict[str, str]:
    """Return the calling thread's /proc/PID/status (proc(5)) by field."""
    lines = Path("/proc/thread-self/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def outside_uid(uid: int) -> int | None:
    """Return the uid outside of this user namespace for a uid in it; None: not mapped, so no process can become it."""
    for line in Path("/proc/self/uid_map").read_text().splitlines():
        inside, outside, count = map(int, line.split())
        if inside <= uid < inside + count:
            return outside + uid - inside
    return None


def _prctl(option: int, value: int, more: int = 0) -> None:
    # Variadic, and some options insist that unused arguments are 0: all four, as unsigned long.
    if _libc.prctl(option, *map(ctypes.c_ulong, (value, more, 0, 0))):
        raise OSError(ctypes.get_errno(), f"prctl(2) refused option {option}")
