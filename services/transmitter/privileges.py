"""The transmitter's sockets, and the proof that it can get no more: capabilities(7), prctl(2), user_namespaces(7).

Standard library alone: the opener uses it while it has privileges to give up.
"""

import ctypes
import errno
import os
import resource
import socket
import struct
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

KINDS: Final = {
    "packet": (socket.AF_PACKET, socket.SOCK_RAW, 0),
    "ip4": (socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW),
    "ip6": (socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_RAW),
}
"""Family, type and protocol of the sockets of each kind."""
SETS: Final = ("CapInh", "CapPrm", "CapEff", "CapAmb")
"""The capabilities that a thread holds or hands on, as /proc/PID/status names them; CapBnd only limits them."""
SO_LOCK_FILTER: Final = 44
PR_SET_DUMPABLE: Final = 4
PR_CAPBSET_DROP: Final = 24
PR_SET_NO_NEW_PRIVS: Final = 38
CAP_SETPCAP: Final = 8
THIS_THREAD: Final = struct.pack("=Ii", 0x20080522, 0)
"""Version 3 of capset(2)."""
NO_CAPABILITIES: Final = bytes(24)
"""The effective, permitted and inheritable set, 32 bits each, twice."""

Opened = dict[str, list[socket.socket]]
"""Sockets by kind, in the order of KINDS."""

ACCOUNTS: Final = "TRANSMITTER_ACCOUNTS"
"""The environment variable by which the opener hands on the path of the accounts' file."""
_libc: Final = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class RawSockets:
    """The opener's sockets, non-blocking and able only to send; or none, for a `reason` that names the cures."""

    packet: tuple[socket.socket, ...] = ()
    ip4: tuple[socket.socket, ...] = ()
    ip6: tuple[socket.socket, ...] = ()
    reason: str = ""

    def __len__(self) -> int:
        return len(self.packet) + len(self.ip4) + len(self.ip6)

    def close(self) -> None:
        """Close them all."""
        for sock in (*self.packet, *self.ip4, *self.ip6):
            sock.close()


def unparse(opened: Opened) -> str:
    """Return the value of `--inherited` for these sockets, as in `packet:5,6;ip4:7,8`."""
    described = {kind: ",".join(str(sock.fileno()) for sock in sockets) for kind, sockets in opened.items()}
    return ";".join(f"{kind}:{descriptors}" for kind, descriptors in described.items() if descriptors)


def adopt(text: str) -> RawSockets:
    """Take over the opener's sockets, by the value of `--inherited`. PermissionError when it is not that.

    >>> adopt("none:there is no user 'x'").reason
    "there is no user 'x'"
    """
    if text.startswith("none:"):
        return RawSockets(reason=text.removeprefix("none:"))
    taken: Opened = {kind: [] for kind in KINDS}
    try:
        for part in text.split(";"):
            kind, _, descriptors = part.partition(":")
            for descriptor in descriptors.split(","):
                taken[kind].append(_adopt(kind, int(descriptor)))
        if not (taken["packet"] and taken["ip4"]):
            raise ValueError(text)
    except (LookupError, ValueError, OverflowError, OSError):
        for sock in (sock for sockets in taken.values() for sock in sockets):
            sock.close()
        raise _refusal("--inherited is for the opener only, and does not name its sockets; leave it out") from None
    return RawSockets(tuple(taken["packet"]), tuple(taken["ip4"]), tuple(taken["ip6"]))


def _adopt(kind: str, descriptor: int) -> socket.socket:
    sock = socket.socket(fileno=descriptor)
    locked = sock.getsockopt(socket.SOL_SOCKET, SO_LOCK_FILTER)  # set by the opener: it lets nothing in
    if not locked or (sock.family, sock.type, sock.proto) != KINDS[kind]:
        sock.close()
        raise ValueError(kind)
    sock.setblocking(False)
    sock.set_inheritable(False)
    return sock


def relinquish(become: tuple[str, int, int] | None) -> None:
    """Give up every privilege, each step while it still can; `become` is name, uid and gid. OSError."""
    harden()
    if int(own_status()["CapEff"], 16) >> CAP_SETPCAP & 1:
        _empty_bounding_set()
    with suppress(PermissionError):  # a plain user keeps its groups; in a user namespace root may have to
        os.setgroups([])
    if become:
        _, uid, gid = become
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
    if _libc.capset(THIS_THREAD, NO_CAPABILITIES):  # the ambient set follows the others (capabilities(7))
        raise OSError(ctypes.get_errno(), "capset(2) was refused")
    _prctl(PR_SET_NO_NEW_PRIVS, 1)


def _empty_bounding_set() -> None:
    for capability in range(64):
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


def prove(sockets: RawSockets) -> dict[str, int]:
    """Return this process's rights, for its status; PermissionError when it can do more than use its sockets."""
    status = own_status()
    if held := [name for name in SETS if int(status[name], 16)]:
        raise _refusal(f"it still holds capabilities: {', '.join(held)}")
    if status["NoNewPrivs"] != "1":
        raise _refusal("it could gain privileges by executing a program")
    # Without sockets it may still be root: where there is no other user to become, it stays up to say so.
    if sockets and _is_or_becomes_root():
        raise _refusal("it is root, or can become root")
    for kind in KINDS:
        if _opens(kind):
            raise _refusal(f"it could open another raw socket: {kind}")
    return {
        "uid": os.geteuid(),
        "gid": os.getegid(),
        "capabilities": 0,
        # Only CAP_SETPCAP empties it; root, which has that, must: see the opener. It gives nothing by itself.
        "bounding_capabilities": int(status["CapBnd"], 16).bit_count(),
        "no_new_privs": 1,
        "raw_sockets": len(sockets),
    }


def _is_or_becomes_root() -> bool:
    if 0 in os.getresuid():
        return outside_uid(0) == 0  # otherwise root of a user namespace (`unshare -Ur`), with no privilege outside
    try:
        os.setuid(0)
    except OSError as error:
        return error.errno not in (errno.EPERM, errno.EINVAL)  # EINVAL: a user namespace without any root
    return True


def _opens(kind: str) -> bool:
    try:
        socket.socket(*KINDS[kind]).close()
    except OSError as error:
        return error.errno not in (errno.EPERM, errno.EACCES, errno.EAFNOSUPPORT)
    return True


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


def _prctl(option: int, value: int) -> None:
    # Variadic, and some options insist that unused arguments are 0: all four, as unsigned long.
    if _libc.prctl(option, *map(ctypes.c_ulong, (value, 0, 0, 0))):
        raise OSError(ctypes.get_errno(), f"prctl(2) refused option {option}")


def _refusal(reason: str) -> PermissionError:
    # `shared.process.lifecycle.run` makes it one line and exit code 77.
    return PermissionError(errno.EPERM, reason, "transmitter refuses to run")
