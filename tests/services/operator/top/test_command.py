import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from shared.ledger.accounts import unparse_origin
from tests.builders import BusEnds, PlayedGateway, make_client, wait_wanted
from tests.services.operator.played import PlayedService, finish, run
from tests.stack import Stack, wait_until

ACCOUNTS: dict[str, dict[str, dict[str, int]]] = {
    "ingest.1": {"stream/messages": {"received": 9, "published": 9}},
    "forwarder.1": {
        unparse_origin("ingest.1", 1, "messages"): {"taken": 9, "reached": 9},
        "collector/siem": {"expected": 9, "offered": 9, "sent": 9, "refusals": 4},
    },
}


class Screen:
    """A terminal in front of the command: what it shows, and keys for it."""

    def __init__(self, stack: Stack, *arguments: str, columns: int = 80, lines: int = 24) -> None:
        self._master, slave = pty.openpty()
        self.resize(columns, lines)
        self.before = termios.tcgetattr(slave)
        environment = stack.environment | {"TERM": "xterm-256color", "NO_COLOR": "1"}
        environment.pop("COLUMNS", None)
        command = [sys.executable, "-m", "services.operator", "top", *arguments]
        self.process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=environment)
        self.slave = slave
        self.written = ""

    def resize(self, columns: int, lines: int) -> None:
        """Give the terminal another size."""
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("4H", lines, columns, 0, 0))

    def press(self, keys: str) -> None:
        """Press keys."""
        os.write(self._master, keys.encode())

    @property
    def frame(self) -> list[str]:
        """The lines of the last whole frame."""
        while select.select([self._master], [], [], 0)[0]:
            self.written += os.read(self._master, 65_536).decode()
        frames = [part.partition("\x1b[J")[0] for part in self.written.split("\x1b[H") if "\x1b[J" in part]
        text = re.sub(r"\x1b\[[0-9;]*[mK]", "", frames[-1]) if frames else ""
        return [line.rstrip() for line in text.split("\r\n")]

    def wait_for(self, condition: Callable[[str], object], what: str, meanwhile: Callable[[], None]) -> str:
        """Wait until the frame as one text is as it should be, and return it."""

        def is_so() -> bool:
            meanwhile()
            time.sleep(0.05)
            return bool(condition("\n".join(self.frame)))

        wait_until(is_so, lambda: f"{what}: {self.frame} {self.written[-2000:]!r}")
        return "\n".join(self.frame)

    def close(self) -> None:
        """End the command, and take the terminal away."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._master)
        os.close(self.slave)


@contextmanager
def shown(stack: Stack, *arguments: str, **size: int) -> Iterator[Screen]:
    """Run the command on a terminal."""
    screen = Screen(stack, *arguments, **size)
    try:
        yield screen
    finally:
        screen.close()


def test_on_a_terminal(stack: Stack) -> None:
    """Frames fit the terminal, also after it has changed; keys are heeded; a broker that comes, goes and comes is seen.

    At the end the terminal is as it was before.
    """
    with shown(stack) as screen:
        screen.wait_for(lambda text: "no broker at /" in text, "it says what is missing", lambda: None)
        broker = stack.start("broker")
        with BusEnds(stack.bus) as bus, PlayedService(stack.bus, "ingest.1") as ingest:
            forwarder, gateway = PlayedService(stack.bus, "forwarder.1"), PlayedGateway(bus)
            with forwarder:
                wait_wanted(gateway.publisher, "registry/")
                gateway.announce(1, make_client("siem", 9514, streams=("messages",)))

                def report() -> None:
                    ingest.report(ACCOUNTS["ingest.1"])
                    forwarder.report(ACCOUNTS["forwarder.1"])

                screen.wait_for(lambda text: "messages" in text and "1 streams 1" in text, "a stream", report)
                screen.press("3")
                frame = screen.wait_for(lambda text: "siem" in text, "a collector", report)
                assert max(map(len, frame.splitlines())) <= 80
                assert "192.0.2" not in frame
                screen.resize(200, 30)
                screen.process.send_signal(signal.SIGWINCH)
                screen.wait_for(lambda text: "127.0.0.1 port 9514" in text, "all columns", report)
                screen.press("t")
                frame = screen.wait_for(lambda text: "t rates" in text, "totals", report)
                (row,) = (line.split() for line in frame.splitlines() if line.startswith("siem"))
                assert {"9", "4", "refused"} <= {*row}
                assert broker.stop() == 0
                screen.wait_for(lambda text: "not heard on the bus" in text, "silence", lambda: None)
                stack.start("broker")
                screen.wait_for(lambda text: "3 collectors 1" in text and "siem" in text, "it reconnects", report)
        screen.press("q")
        wait_until(lambda: (screen.frame, screen.process.poll() is not None)[1], "it ends")
        assert screen.process.returncode == 0
        assert screen.written.startswith("\x1b[?1049h\x1b[?25l")
        assert screen.written.endswith("\x1b[?25h\x1b[?1049l")
        assert termios.tcgetattr(screen.slave) == screen.before


def test_elsewhere_it_prints_lines(stack: Stack) -> None:
    """In a pipe it prints a line for each row, as often as asked, and ends with 0; without a broker it is 69."""
    code, text = run(stack, "top", "-n", "1")
    assert (code, f"no broker at {stack.bus}" in text) == (69, True)
    stack.start("broker")
    top = stack.operator("top", "-n", "2")
    with PlayedService(stack.bus, "ingest.1") as ingest:
        while top.process.poll() is None:
            ingest.report(ACCOUNTS["ingest.1"])
            time.sleep(0.2)
    code, text = finish(top)
    rows: list[Any] = [line.split("\t") for line in text.splitlines()]
    assert (code, [row[:2] for row in rows if row[0] == "stream"]) == (0, [["stream", "messages"]] * 2)
    assert [row[1] for row in rows if row[0] == "fanwire"] == ["error"] * 2
    assert all("received=9" in row for row in rows if row[0] == "stream")
    assert "\x1b" not in text
