"""A name server on loopback port 53 for programs under test, and the way to have them ask it; nothing goes further."""

import ipaddress
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Self

import pytest

from tests.lab import assert_entered, assert_no_way_out
from tests.stack import Running, Stack

HEADER, TYPE_A, TYPE_AAAA, NAME_ERROR = 12, 1, 28, 3
IN_FILES_OF_OURS = (
    "mount --bind {at}/resolv.conf /etc/resolv.conf && mount --bind {at}/hosts /etc/hosts && "
    "mount --bind {at}/nsswitch.conf /etc/nsswitch.conf && exec {python} {program}"
)
BOUNDED = (
    "-c 'import sys; from importlib import import_module; from shared.net.addresses import resolve; "
    'resolve.__defaults__ = ({bound},); sys.exit(import_module("services.{name}.__main__").main())\''
)
"""A service that waits less long for the resolver."""


class NameServer(threading.Thread):
    """Answers by `addresses`; while `silent` it takes questions and says nothing, until told to answer after all."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        assert_entered()
        assert_no_way_out()
        self.addresses: dict[str, list[str]] = {}
        self.silent = False
        self.asked = 0
        self.unanswered: list[tuple[bytes, tuple[str, int]]] = []
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind(("127.0.0.1", 53))

    def run(self) -> None:
        """Answer until an empty datagram comes."""
        while True:
            question, peer = self.socket.recvfrom(512)
            if not question:
                return
            self.asked += 1
            if self.silent:
                self.unanswered.append((question, peer))
            else:
                self.socket.sendto(self.answer(question), peer)

    def answer_late(self) -> None:
        """Be silent no more, and answer what was asked meanwhile."""
        self.silent = False
        for question, peer in self.unanswered:
            self.socket.sendto(self.answer(question), peer)

    def answer(self, question: bytes) -> bytes:
        """Return the answer to one question (RFC 1035, 4.1)."""
        labels, at = [], HEADER
        while size := question[at]:
            labels.append(question[at + 1 : at + 1 + size].decode().lower())
            at += size + 1
        kind, asked = int.from_bytes(question[at + 1 : at + 3]), question[HEADER : at + 5]
        known = self.addresses.get(".".join(labels))
        version = {TYPE_A: 4, TYPE_AAAA: 6}.get(kind)
        found = [ip.packed for ip in map(ipaddress.ip_address, known or ()) if ip.version == version]
        code = 0x8180 if known is not None else 0x8180 | NAME_ERROR
        head = question[:2] + b"".join(number.to_bytes(2) for number in (code, 1, len(found), 0, 0))
        rest = [b"\xc0\x0c" + asked[-4:] + bytes(4) + len(packed).to_bytes(2) + packed for packed in found]
        return head + asked + b"".join(rest)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as ending:
            ending.sendto(b"", ("127.0.0.1", 53))
        self.join()
        self.socket.close()


def start_asking(
    stack: Stack, name: str, patience_seconds: int = 1, *, ready: bool = True, bound: float | None = None
) -> Running:
    """Start a service that asks the server above, in a mount namespace of its own, and waits for so long.

    `name` may have arguments behind it; with `bound` it has none, and waits only so long for the resolver.
    """
    apart = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "--map-root-user"]
    if subprocess.run([*apart, "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs a mount namespace of its own")
    at = stack.directory
    (at / "resolv.conf").write_text(f"nameserver 127.0.0.1\noptions timeout:{patience_seconds} attempts:1\n")
    (at / "hosts").write_text("127.0.0.1 localhost\n")
    (at / "nsswitch.conf").write_text("hosts: files dns\n")
    missing = [path for path in ("/etc/nsswitch.conf", "/etc/resolv.conf", "/etc/hosts") if not Path(path).exists()]
    if missing:
        pytest.skip(f"{missing[0]}: nothing to mount over")
    program = f"-m services.{name}" if bound is None else BOUNDED.format(name=name, bound=bound)
    command = IN_FILES_OF_OURS.format(at=at, python=sys.executable, program=program)
    running = stack.spawn(name, [*apart, "sh", "-c", command], HONCHO_PROCESS_NAME=f"{name}.1")
    if ready:
        running.wait_for('"event": "ready"')
    return running
