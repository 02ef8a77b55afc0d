"""Where watched and collected datagrams go: lines on standard output, or payloads in a file."""

import codecs
import contextlib
import errno
import io
import os
import sys
from collections.abc import Callable, Iterable
from itertools import islice
from typing import BinaryIO, Final

import msgspec

from services.operator.cli.arguments import positive
from shared.net.printable import printable
from shared.process.lifecycle import Parser

NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO})
"""Why a file takes no more: a full disk or quota, too long a file, a terminal that has gone or a disk that fails."""

Form = Callable[[str, int, bytes], bytes]
"""Makes of a datagram's source address, source port and payload what is written."""


def as_text(address: str, port: int, payload: bytes) -> bytes:
    r"""The documented line.

    >>> as_text("127.0.0.1", 53411, b"Hello you there!").decode()
    "Got message from ('127.0.0.1', 53411): b'Hello you there!'\n"
    """
    return f"Got message from {(address, port)!r}: {payload!r}\n".encode()


def as_hex(address: str, port: int, payload: bytes) -> bytes:
    """The documented line with the payload in hexadecimal."""
    return f"Got message from {(address, port)!r}: {payload.hex()}\n".encode()


def as_documented_answerer(address: str, port: int, payload: bytes) -> bytes:
    r"""The two lines that the documented server prints which answers.

    >>> as_documented_answerer("127.0.0.1", 53411, b"Hello").decode()
    "Got connection from: ('127.0.0.1', 53411)\nIt said: b'Hello'\n"
    """
    return f"Got connection from: {(address, port)!r}\nIt said: {payload!r}\n".encode()


def as_json(address: str, port: int, payload: bytes) -> bytes:
    r"""A JSON object on a line, the payload in hexadecimal as in `transmit`.

    >>> as_json("127.0.0.1", 53411, b"Hello").decode()
    '{"address":"127.0.0.1","port":53411,"payload":"48656c6c6f"}\n'
    """
    return msgspec.json.encode({"address": address, "port": port, "payload": payload.hex()}) + b"\n"


def as_payload(_address: str, _port: int, payload: bytes) -> bytes:
    """The payload alone, as a line."""
    return payload + b"\n"


class Output:
    """Writes datagrams, at most `count` when that is given. BrokenPipeError when nobody reads any more."""

    def __init__(self, file: BinaryIO, form: Form, count: int | None) -> None:
        self._file = file
        self._form = form
        self._left = count

    @property
    def full(self) -> bool:
        """Whether as many as wanted were written."""
        return self._left == 0

    def write(self, datagrams: Iterable[tuple[str, int, bytes]]) -> None:
        """Write and flush them: whoever reads along is to see them now."""
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


def say(text: str) -> None:
    """Print a line for the operator on standard error; standard output is for datagrams."""
    with contextlib.suppress(OSError):  # the terminal has gone
        print(printable(text), file=sys.stderr, flush=True)


def escape_what_cannot_be_encoded() -> None:
    """Have standard output and error write an escape for a character that the terminal's encoding does not have."""
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
    """Send what standard output still holds, and can't be written, to nowhere, so that the exit does not fail too."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
