"""The rules for a client's name, the same for both protocols. No I/O."""

import re
import unicodedata
from typing import Final

from services.gateway.protocol.requests import RequestError

MAX_NAME: Final = 255
"""Bytes of UTF-8."""

_BEFORE_JSON: Final = b"\xef\xbb\xbf \t\r\n"
"""A byte order mark in UTF-8, and white space."""
_HTTP: Final = re.compile(rb"[A-Z]{3,20} [^\r\n]* HTTP/\d")


def parse_name(data: bytes) -> str:
    r"""Return the name that a client of the documented protocol sent. `RequestError` when it is none.

    >>> parse_name(b"router-7\r\n")
    'router-7'
    """
    try:
        if _HTTP.match(data):
            message = "this is no HTTP server; send a name, or one JSON object a line"
            raise RequestError("bad_request", message, cross_protocol=True)
        if data.lstrip(_BEFORE_JSON).startswith(b"{"):
            raise RequestError("bad_request", "a JSON line begins with `{` as its first byte; send nothing before it")
        return check_name(data[: MAX_NAME + 3].rstrip(b"\r\n"))
    except RequestError as refused:
        refused.closes = True
        raise


def check_name(data: bytes) -> str:
    """Return the text of a name, from either protocol; `bad_name` when it breaks a rule."""
    if not 1 <= len(data) <= MAX_NAME:
        raise RequestError("bad_name", f"expected a name of 1 to {MAX_NAME} bytes")
    try:
        name = data.decode()
    except UnicodeDecodeError:
        raise RequestError("bad_name", "expected a name in UTF-8") from None
    if any(unicodedata.category(character) == "Cc" for character in name):
        raise RequestError("bad_name", "the name has control characters; send the name alone")
    return name
