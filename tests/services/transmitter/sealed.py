"""The transmitter's second step, which seals itself once it is ready: opening a file, or making a socket, ends it.

Sockets of AF_UNIX are refused instead: a worker of which it hears then is asked for what it lends, or else sends it.
At its end it prints what modules it has.
"""

import errno
import json
import os
import socket
import sys
from pathlib import Path
from typing import Final

SCMP_ACT_KILL_PROCESS: Final = 0x80000000
OPENING: Final = ("open", "openat", "openat2", "open_by_handle_at", "creat", "socketpair", "execve", "execveat", "fork")


def main() -> int:
    """Be the service; PROGRAM is where it is, and the copied tests are beside this file."""
    before = set(sys.modules)
    sys.path[:0] = [os.environ["PROGRAM"], str(Path(__file__).parent)]
    from shared.process.privileges import harden

    harden()
    import shared.process.lifecycle
    from services.transmitter.unprivileged import main as serve

    announce_ready = shared.process.lifecycle.announce_ready

    def announce_and_seal(service: str, **facts: object) -> None:
        announce_ready(service, **facts)
        seal()

    shared.process.lifecycle.announce_ready = announce_and_seal
    code = serve(sys.argv[1:])
    names = sorted({name.partition(".")[0] for name in set(sys.modules) - before})
    print(json.dumps({"event": "modules", "names": names}))
    return code


def seal() -> None:
    """Let no thread open anything from now on."""
    from tests.deploy.confined import AF_MAX, SCMP_ACT_ALLOW, SCMP_ACT_ERRNO, SCMP_CMP_EQ, Comparison, Filter

    sealed = Filter(SCMP_ACT_ALLOW, every_thread=True)
    for name in OPENING:
        sealed.add(SCMP_ACT_KILL_PROCESS, name)
    for family in range(AF_MAX):
        action = SCMP_ACT_ERRNO | errno.EPERM if family == socket.AF_UNIX else SCMP_ACT_KILL_PROCESS
        sealed.add(action, "socket", Comparison(0, SCMP_CMP_EQ, family, 0))
    sealed.load()


if __name__ == "__main__":
    sys.exit(main())
