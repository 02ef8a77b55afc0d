"""The transmitter's sockets, and the proof that it can get no more: capabilities(7), user_namespaces(7).

Standard library alone: the opener uses it while it has privileges to give up.
"""

import errno
import os
import socket
from dataclasses import dataclass
from typing import Final

from shared.process.privileges import SETS, outside_uid, own_status

KINDS: Final = {
    "packet": (socket.AF_PACKET, socket.SOCK_RAW, 0),
    "ip4": (socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW),
    "ip6": (socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_RAW),
}
"""Family, type and protocol of the sockets of each kind."""
SO_LOCK_FILTER: Final = 44
Opened = dict[str, list[socket.socket]]
"""Sockets by kind, in the order of KINDS."""

ACCOUNTS: Final = "TRANSMITTER_ACCOUNTS"
"""The environment variable by which the opener hands on the path of the accounts' file."""


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


def _refusal(reason: str) -> PermissionError:
    # `shared.process.lifecycle.run` makes it one line and exit code 77.
    return PermissionError(errno.EPERM, reason, "transmitter refuses to run")
