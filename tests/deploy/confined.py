"""Runs a command under what a unit's sandbox denies by seccomp, as systemd would: `confined.py UNIT COMMAND...`.

No systemd has to run for it: libseccomp builds the filters, and systemd-analyze says what its sets of calls contain.
"""

import ctypes
import errno
import os
import socket
import subprocess
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Final

SCMP_ACT_ALLOW: Final = 0x7FFF0000
SCMP_ACT_ERRNO: Final = 0x00050000
SCMP_FLTATR_CTL_TSYNC: Final = 4
SCMP_CMP_EQ: Final = 4
SCMP_CMP_MASKED_EQ: Final = 7
AF_MAX: Final = 46
PROT_WRITE: Final = 2
PROT_EXEC: Final = 4


class Comparison(ctypes.Structure):
    """The condition of a rule for an argument (struct scmp_arg_cmp)."""

    _fields_ = (("arg", ctypes.c_uint), ("op", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64))


class Filter:
    """A seccomp filter: a default, and rules with another action; for this thread, and those it will start, or all."""

    def __init__(self, default: int, *, every_thread: bool = False) -> None:
        self._lib = ctypes.CDLL("libseccomp.so.2")
        self._lib.seccomp_init.restype = ctypes.c_void_p
        self._lib.seccomp_rule_add_array.argtypes = (
            ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p,
        )  # fmt: skip
        self._context = ctypes.c_void_p(self._lib.seccomp_init(default))
        assert self._lib.seccomp_attr_set(self._context, SCMP_FLTATR_CTL_TSYNC, int(every_thread)) == 0

    def add(self, action: int, name: str, *comparisons: Comparison) -> None:
        """Give a call, with these arguments, another action; one that this machine does not have is passed over."""
        number = self._lib.seccomp_syscall_resolve_name(name.encode())
        if number >= 0:
            array = (Comparison * len(comparisons))(*comparisons)
            assert self._lib.seccomp_rule_add_array(self._context, action, number, len(array), array) == 0, name

    def load(self) -> None:
        """Apply it to this process for good, with no_new_privs."""
        assert self._lib.seccomp_load(self._context) == 0


def values(unit: str, key: str) -> list[str]:
    """The words that a unit gives a setting, in order; `~` in front of each word of a line that begins with it."""
    words: list[str] = []
    for line in unit.splitlines():
        name, _, value = line.partition("=")
        if name == key:
            mark = value[: value.startswith("~")]
            words += [mark + word for word in value.removeprefix("~").split()]
    return words


@cache
def call_sets() -> dict[str, list[str]]:
    """Return the sets of system calls such as `@system-service`: calls, and other sets."""
    said = subprocess.run(["systemd-analyze", "syscall-filter"], capture_output=True, text=True, check=True).stdout
    found: dict[str, list[str]] = {}
    for line in said.splitlines():
        if line.startswith("@"):
            members = found.setdefault(line, [])
        elif line.startswith(" ") and "#" not in line:
            members.append(line.strip())
    return found


def expand(name: str) -> set[str]:
    """Return the system calls of a set, or the one call."""
    return set().union(*map(expand, call_sets()[name])) if name.startswith("@") else {name}


def allowed_calls(words: Iterable[str]) -> set[str]:
    """Return the calls that SystemCallFilter= leaves, its words taken in order."""
    calls: set[str] = set()
    for word in words:
        if word.startswith("~"):
            calls -= expand(word[1:])
        else:
            calls |= expand(word)
    return calls


def confine(unit: str) -> None:
    """Deny this process what the unit denies: calls, address families, memory both written and executed."""
    calls = allowed_calls(values(unit, "SystemCallFilter"))
    families = {int(getattr(socket, name)) for name in values(unit, "RestrictAddressFamilies")}
    by_argument = Filter(SCMP_ACT_ALLOW)
    for family in set(range(AF_MAX)) - families:
        refusal = SCMP_ACT_ERRNO | errno.EAFNOSUPPORT
        by_argument.add(refusal, "socket", Comparison(0, SCMP_CMP_EQ, family, 0))
    if values(unit, "MemoryDenyWriteExecute") == ["yes"]:
        both = PROT_WRITE | PROT_EXEC
        by_argument.add(SCMP_ACT_ERRNO | errno.EPERM, "mmap", Comparison(2, SCMP_CMP_MASKED_EQ, both, both))
        for name in ("mprotect", "pkey_mprotect"):
            by_argument.add(SCMP_ACT_ERRNO | errno.EPERM, name, Comparison(2, SCMP_CMP_MASKED_EQ, PROT_EXEC, PROT_EXEC))
    by_call = Filter(SCMP_ACT_ERRNO | errno.EPERM)
    for name in calls:
        by_call.add(SCMP_ACT_ALLOW, name)
    by_argument.load()
    by_call.load()


if __name__ == "__main__":
    confine(Path(sys.argv[1]).read_text())
    os.execvp(sys.argv[2], sys.argv[2:])
