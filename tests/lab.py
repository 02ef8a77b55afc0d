"""A network namespace of the run's own: loopback and nothing else, so that no test can reach a real network."""

import ctypes
import fcntl
import os
import socket
import struct
from pathlib import Path
from typing import Final

CLONE_NEWUSER: Final = 0x10000000
CLONE_NEWNET: Final = 0x40000000
SIOCSIFFLAGS: Final = 0x8914
IFF_UP: Final = 1

_entered = False


def enter_lab() -> str:
    """Enter the namespace and assert that it has no way out; return why it can't be had, or an empty string."""
    global _entered
    libc = ctypes.CDLL(None, use_errno=True)
    uid, gid = os.geteuid(), os.getegid()
    allowed = libc.unshare(CLONE_NEWNET) == 0  # root, or started by who has entered a user namespace already
    if not allowed and libc.unshare(CLONE_NEWNET | CLONE_NEWUSER):
        return f"unshare(2) says: {os.strerror(ctypes.get_errno())} (are user namespaces switched off?)"
    if not allowed:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
    bring_loopback_up()
    assert_no_way_out()
    _entered = True
    return ""


def bring_loopback_up() -> None:
    """Bring up loopback in the namespace that this thread is in."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", IFF_UP))


def enter_network(descriptor: int) -> None:
    """Move this thread into the network namespace that the descriptor holds, setns(2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def assert_entered() -> None:
    """Refuse to make any device outside of the run's own namespace."""
    assert _entered, "not in a network namespace of our own: enter_lab() first"


def assert_no_way_out() -> None:
    """Every route must be on loopback."""
    tables = (Path("/proc/thread-self/net/route"), Path("/proc/thread-self/net/ipv6_route"))
    routes = [line.split() for table in tables if table.exists() for line in table.read_text().splitlines()]
    devices = {route[0] if len(route) == 11 else route[-1] for route in routes if route and route[0] != "Iface"}
    assert devices <= {"lo"}, f"routes on {devices - {'lo'}}: refusing to send anything"
