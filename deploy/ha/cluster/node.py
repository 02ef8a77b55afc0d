"""The first process of a node: starts its relay and its NATS server, and both again at SIGUSR1 if they are gone.

It waits for a line of standard input before it starts anything, and ends when there is no more input.
"""

import os
import select
import signal
import sys
import time
from contextlib import suppress
from typing import Final

from deploy.ha.cluster.layout import NODES, Place, environment

END_SECONDS: Final = 8.0


class Node:
    """The programs of a node, by their process ids."""

    def __init__(self, place: Place, name: str) -> None:
        directory = place.of(name)
        os.environ |= environment(place, name)
        self._commands = {
            "nats": ["nats-server", "-c", str(directory / "nats.conf")],
            "relay": ["fanwire", "run", "--config", str(directory / "fanwire.toml")],
        }
        self._logs = {each: directory / f"{each}.log" for each in self._commands}
        self._running: dict[int, str] = {}

    def start(self) -> None:
        """Start what does not run."""
        for name in self._commands.keys() - set(self._running.values()):
            command = self._commands[name]
            actions = [
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_OPEN, 1, str(self._logs[name]), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644),
                (os.POSIX_SPAWN_DUP2, 1, 2),
            ]
            pid = os.posix_spawnp(command[0], command, os.environ, file_actions=actions, setsid=True)
            self._running[pid] = name

    def reap(self) -> None:
        """Note what has ended; as the first process it also inherits orphans."""
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                self._running.pop(ended[0], None)

    def end(self) -> None:
        """Ask all to end, and wait a while; the kernel kills what is left when this process ends."""
        for pid in self._running:
            os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + END_SECONDS
        while self._running and time.monotonic() < deadline:
            time.sleep(0.05)
            self.reap()


def main(name: str) -> None:
    """Run until the end of standard input."""
    asked = False

    def ask(*_: object) -> None:
        nonlocal asked
        asked = True

    signal.signal(signal.SIGUSR1, ask)
    sys.stdin.readline()
    node = Node(Place(), name) if name in NODES else None
    asked = True
    while not select.select([sys.stdin], [], [], 0.2)[0]:
        if node:
            node.reap()
            if asked:
                asked = False
                node.start()
    if node:
        node.end()


if __name__ == "__main__":
    main(sys.argv[1])
