"""Output of watched and collected datagrams: lines on standard output, or payloads in a file."""

import codecs
import contextlib
import errno
import io
import os
import sys
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import BinaryIO, Final

import msgspec

from services.operator.cli.arguments import positive
from shared.net.printable import printable
from shared.process.lifecycle import CANT_CREATE, USAGE, OperatorError, Parser

NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO})
"""Errors of a file that takes no more: full disk or quota, file too long, terminal gone, or failing disk."""

STANDARD_OUTPUT: Final = Path("-")

Form = Callable[[str, int, bytes], bytes]
"""Turns a datagram's source address, source port and payload into the bytes to write."""


def as_text(address: str, port: int, payload: bytes) -> bytes:
    r"""Return the documented line.

    >>> as_text("127.0.0.1", 53411, b"Hello you there!").decode()
    "Got message from ('127.0.0.1', 53411): b'Hello you there!'\n"
    """
    return f"Got message from {(address, port)!r}: {payload!r}\n".encode()


def as_hex(address: str, port: int, payload: bytes) -> bytes:
    """Return the documented line with the payload in hexadecimal."""
    return f"Got message from {(address, port)!r}: {payload.hex()}\n".encode()


def as_documented_answerer(address: str, port: int, payload: bytes) -> bytes:
    r"""Return the two lines that the documented server prints when it answers.

    >>> as_documented_answerer("127.0.0.1", 53411, b"Hello").decode()
    "Got connection from: ('127.0.0.1', 53411)\nIt said: b'Hello'\n"
    """
    return f"Got connection from: {(address, port)!r}\nIt said: {payload!r}\n".encode()


def as_json(address: str, port: int, payload: bytes) -> bytes:
    r"""Return a JSON object on a line, the payload in hexadecimal as in `transmit`.

    >>> as_json("127.0.0.1", 53411, b"Hello").decode()
    '{"address":"127.0.0.1","port":53411,"payload":"48656c6c6f"}\n'
    """
    return msgspec.json.encode({"address": address, "port": port, "payload": payload.hex()}) + b"\n"


def as_payload(_address: str, _port: int, payload: bytes) -> bytes:
    """Return the payload alone, as a line."""
    return payload + b"\n"


class Output:
    """Writes datagrams, at most `count` if it is given. BrokenPipeError when the reader has gone."""

    def __init__(self, file: BinaryIO, form: Form, count: int | None) -> None:
        self._file = file
        self._form = form
        self._left = count

    @property
    def full(self) -> bool:
        """Return whether the wanted number was written."""
        return self._left == 0

    def write(self, datagrams: Iterable[tuple[str, int, bytes]]) -> None:
        """Write and flush datagrams: the reader should see them now."""
        lines = [self._form(*datagram) for datagram in islice(datagrams, self._left)]
        if self._left is not None:
            self._left -= len(lines)
        left = memoryview(b"".join(lines))
        while left:  # a file without a buffer may take less
            left = left[self._file.write(left) :]
        self._file.flush()


def add_output_arguments(parser: Parser) -> None:
    """Add `--hex` and `--count`."""
    parser.add_argument("--hex", action="store_true", help="print payloads in hexadecimal")
    add_count_argument(parser)


def add_count_argument(parser: Parser) -> None:
    """Add `--count`."""
    parser.add_argument("--count", type=positive, metavar="N", help="end after N datagrams")


def is_capture(path: Path) -> bool:
    """Return whether a file's name says that it is to be a capture."""
    return path.suffix == ".pcapng"


def open_capture(path: Path, closing: ExitStack) -> BinaryIO:
    """Open a new file, or standard output for `-`. OperatorError when there is one already, or it can't be made."""
    if path == STANDARD_OUTPUT:
        if sys.stdout.isatty():
            raise OperatorError(USAGE, "a capture is not for a terminal; name a file, or pipe it into `tshark -r -`")
        return sys.stdout.buffer
    try:
        file: BinaryIO = closing.enter_context(path.open("xb", buffering=0))
    except FileExistsError:
        raise OperatorError(CANT_CREATE, f"{path} exists; name a new file for the capture") from None
    except OSError as error:
        raise cant_write(path, error) from None
    return file


def cant_write(path: Path, error: OSError) -> OperatorError:
    """Return the fault of a file that can't be made."""
    return OperatorError(CANT_CREATE, f"{path}: {error.strerror}; name a file that this user can write")


def say(text: str) -> None:
    """Print a line for the operator on standard error; standard output is for datagrams."""
    with contextlib.suppress(OSError):  # the terminal has gone
        print(printable(text), file=sys.stderr, flush=True)


def escape_what_cannot_be_encoded() -> None:
    """Make standard output and error escape characters that the terminal's encoding does not have."""
    codecs.register_error("json-escape", _escape)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="json-escape")


def _escape(error: UnicodeError) -> tuple[str, int]:
    r"""Write characters as JSON does, `\u00e9`, so that JSON stays JSON."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    units = error.object[error.start : error.end].encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[at : at + 4]}" for at in range(0, len(units), 4)), error.end


def discard_output() -> None:
    """Discard what standard output still holds and can't write, so that the exit does not fail too."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
