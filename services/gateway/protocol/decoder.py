"""Decodes the bytes of clients to requests. No I/O; whatever the bytes, it raises only `RequestError`.

The first byte decides: `{` begins JSON lines, anything else is a name, as in the documented protocol.
"""

import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec
from msgspec import Struct

from services.gateway.protocol.client_names import check_name, parse_name
from services.gateway.protocol.requests import (
    EXPECTED,
    FRAME_EXPECTED,
    OPERATIONS,
    Id,
    Operation,
    Register,
    Request,
    RequestError,
    SignUp,
    parse_octets,
)

MAX_LINE: Final = 64 * 1024
"""Bytes of a JSON line without its newline: the longest sensible `register` has under 10,000."""


class _Head(Struct, frozen=True):
    """The fields of an invalid request that its answer needs."""

    op: Any = None
    id: Any = None


_operations: Final = msgspec.json.Decoder(Operation, dec_hook=parse_octets)
_heads: Final = msgspec.json.Decoder(_Head)


class Decoder:
    """Turns one connection's bytes into requests: `feed` each read, `end` at its end, `next_request` until it is None.

    After a `RequestError` that closes, nothing more is returned.
    """

    __slots__ = ("_buffer", "_deaf", "_ended", "_names", "_scanned")

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._scanned = 0
        self._names: bool | None = None  # not known before the first byte
        self._deaf = False
        self._ended = False

    @property
    def buffered(self) -> int:
        """Bytes held that belong to requests not yet returned."""
        return len(self._buffer)

    def feed(self, data: bytes) -> None:
        """Add the bytes of one read, at least one. A name is all of the first read; later reads are ignored."""
        if self._deaf:
            return
        self._buffer += data
        if self._names is None:
            self._names = self._deaf = not data.startswith(b"{")

    def end(self) -> None:
        """Note that nothing more comes: the rest counts as a line without its newline."""
        self._ended = True

    def next_request(self) -> Request | None:
        """Return the next request, None when more bytes are needed; `RequestError` when it is invalid."""
        try:
            data = self._next_data()
            if data is None:
                return None
            return SignUp(parse_name(data)) if self._names else parse_request(data)
        except RequestError as refused:
            if refused.closes:
                self._buffer.clear()
                self._deaf = True
            raise

    def _next_data(self) -> bytes | None:
        if not self._names and self._buffer.startswith((b"\r", b"\n")):
            self._buffer = self._buffer.lstrip(b"\r\n")  # blank lines are no requests, and there may be 64 Ki of them
        if not self._buffer:
            return None
        size = len(self._buffer)
        stop = size if self._names else self._buffer.find(b"\n", self._scanned)
        if not self._names and (size if stop < 0 else stop) > MAX_LINE:
            raise RequestError("too_long", f"a line has at most {MAX_LINE} bytes; send one request a line", closes=True)
        if stop < 0:
            self._scanned = size
            if not self._ended:
                return None
            stop = size
        data = bytes(self._buffer[:stop])
        del self._buffer[: stop + 1]
        self._scanned = 0
        return data


def parse_request(line: bytes) -> Operation:
    """Return the request in one line. A line that is no JSON object ends the connection: it is another protocol."""
    try:
        line.decode()
        request: Operation = _operations.decode(line)
        json.loads(line, object_pairs_hook=_check_names)
    except msgspec.ValidationError as error:
        with contextlib.suppress(ValueError, RecursionError):  # as for a number with thousands of digits
            json.loads(line, object_pairs_hook=_check_names)
        raise _explain(line, str(error)) from None
    except (msgspec.DecodeError, ValueError, RecursionError):
        raise _not_an_object() from None
    if isinstance(request, Register):
        try:
            check_name(request.name.encode())
        except RequestError as refused:
            refused.id = request.id
            raise
    return request


def _check_names(fields: Sequence[tuple[str, object]]) -> None:
    """Refuse a duplicate field: one reader uses the first, another the last (RFC 8259, 4)."""
    if len(dict(fields)) < len(fields):
        raise RequestError("bad_request", "duplicate field in JSON object; send each at most once", closes=True)


def _not_an_object() -> RequestError:
    return RequestError("bad_request", "expected one JSON object a line, in UTF-8, not deeply nested", closes=True)


def _explain(line: bytes, reason: str) -> RequestError:
    """Return the refusal of a JSON object that is no valid request, with its `id` if that is valid."""
    try:
        head = _heads.decode(line)
    except (msgspec.DecodeError, RecursionError):
        return _not_an_object()
    try:
        identity = msgspec.convert(head.id, Id | None)
    except msgspec.ValidationError:
        identity = None
    if head.op not in OPERATIONS:
        return RequestError("bad_request", f"unknown op; expected one of {', '.join(OPERATIONS)}", id=identity)
    expected = EXPECTED | FRAME_EXPECTED if head.op == "transmit" else EXPECTED
    return RequestError("bad_request", _sentence(reason, expected), id=identity)


def _sentence(reason: str, expected: Mapping[str, str]) -> str:
    """Return msgspec's reason as a sentence with the cure.

    >>> _sentence("Expected `int` <= 65535 - at `$.port`", EXPECTED)
    'port: expected a whole number from 1 to 65535'
    """
    reason, _, at = reason.partition(" - at `$.")
    key = re.match(r"\w*", at)[0]  # type: ignore[index]  # it matches anything
    if key in expected:
        return f"{key}: expected {expected[key]}"
    if missing := re.fullmatch(r"Object missing required field `(.*)`", reason):
        return f"{missing[1]} is missing: expected {expected[missing[1]]}"
    return reason.replace("Object contains unknown field", "this op has no field")
