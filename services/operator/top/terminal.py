"""The terminal of `top`: a screen of its own, keys one by one, and everything as before at the end."""

import os
import re
import signal
import sys
import termios
import tty
from types import TracebackType
from typing import Any, Final, Self

ENTER: Final = "\x1b[?1049h\x1b[?25l"
LEAVE: Final = "\x1b[?25h\x1b[?1049l"
"""The alternate screen, without a cursor, and back (xterm's control sequences, DEC private modes 1049 and 25)."""
HOME, CLEAR_LINE, CLEAR_BELOW = "\x1b[H", "\x1b[K", "\x1b[J"
NAMES: Final = {
    "\x1b[A": "up",
    "\x1b[B": "down",
    "\x1b[5~": "page up",
    "\x1b[6~": "page down",
    "\x1b[H": "home",
    "\x1b[F": "end",
    "\x1b": "escape",
    "\r": "\n",
}
"""Names of keys; those that are not here stand for themselves."""
KEY: Final = re.compile(r"\x1b(?:\[[0-9;]*[A-Za-z~]|O[A-Z])?|.", re.DOTALL)
CONTROL_CHARACTERS: Final = 6
"""Their place in what `termios.tcgetattr` returns."""


def split_keys(text: str) -> list[str]:
    r"""Return the keys in what a terminal sent at once.

    >>> split_keys("s\x1b[6~/a\r\x1b")
    ['s', 'page down', '/', 'a', '\n', 'escape']
    """
    return [NAMES.get(each.replace("\x1bO", "\x1b["), each) for each in KEY.findall(text)]


class Terminal:
    """The terminal on standard output, and on standard input if that is one too. Use it by `with`."""

    def __init__(self) -> None:
        self.input: int | None = sys.stdin.fileno() if sys.stdin.isatty() else None
        """The descriptor that keys come from; None: there are none."""
        self._before: list[Any] = []

    def __enter__(self) -> Self:
        if self.input is not None:
            self._before = termios.tcgetattr(self.input)
            tty.setcbreak(self.input, termios.TCSADRAIN)
            modes = termios.tcgetattr(self.input)
            modes[CONTROL_CHARACTERS][termios.VSUSP] = b"\0"  # Ctrl-Z would leave the screen as it is
            termios.tcsetattr(self.input, termios.TCSADRAIN, modes)
        signal.signal(signal.SIGWINCH, lambda *_: None)  # it wakes the loop, by Lifecycle's descriptor
        self._write(ENTER)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGWINCH, signal.SIG_DFL)
        self._write(LEAVE)
        if self.input is not None:
            termios.tcsetattr(self.input, termios.TCSADRAIN, self._before)

    def show(self, frame: str) -> None:
        """Replace what is shown, without a flicker."""
        lines = frame.split("\n")
        self._write(HOME + "\r\n".join(f"{line}{CLEAR_LINE}" for line in lines) + CLEAR_BELOW)

    def read_keys(self) -> list[str]:
        """Return the keys that were pressed; `q` where the terminal has gone."""
        assert self.input is not None
        said = os.read(self.input, 1024)
        return split_keys(said.decode(errors="replace")) if said else ["q"]

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()
