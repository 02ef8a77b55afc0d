"""Keys of the bucket, and the names in them. No I/O.

Bytes of a name that a key may not have are written as `=` and two hex digits.
"""

import re
from contextlib import suppress
from typing import Final

CLIENT: Final = "list.client."
WITHHELD: Final = "list.withheld."
LISTED: Final = "list.>"
"""The keys of what makes the list: a record here is written only by who knows the last one."""
PAST: Final = "past."
SESSION: Final = "session."
META: Final = "meta"
_TOKEN: Final = re.compile(r"(?:[A-Za-z0-9_-]|=[0-9A-F]{2})+")
_OTHER: Final = re.compile(rb"[^A-Za-z0-9_-]")
_ESCAPE: Final = re.compile(rb"=([0-9A-F]{2})")


def bucket_name(registry: str) -> str:
    """Return the bucket's name for `[uplink] registry`."""
    return f"fanwire-{registry}"


def stream_name(registry: str) -> str:
    """Return the name of the stream that is the bucket."""
    return f"KV_{bucket_name(registry)}"


def subject_of(registry: str, key: str) -> str:
    """Return the subject of a key."""
    return f"$KV.{bucket_name(registry)}.{key}"


def unparse_name(name: str) -> str:
    """Return a name as a token of a key; `parse_name` is the way back.

    >>> unparse_name("siem 1.münchen")
    'siem=201=2Em=C3=BCnchen'
    """
    return _OTHER.sub(lambda found: b"=%02X" % found[0][0], name.encode()).decode()


def name_in(key: str) -> str:
    """Return the name in a key of the list; empty: it has none.

    >>> name_in("list.withheld.siem=201"), name_in("session.berlin")
    ('siem 1', '')
    """
    for prefix in (CLIENT, WITHHELD):
        if key.startswith(prefix):
            with suppress(ValueError):
                return parse_name(key.removeprefix(prefix))
    return ""


def parse_name(token: str) -> str:
    """Return the name that a token stands for. ValueError when it stands for none.

    >>> parse_name("siem=201")
    'siem 1'
    """
    if not _TOKEN.fullmatch(token):
        raise ValueError("not the key of a name")
    name = _ESCAPE.sub(lambda found: bytes.fromhex(found[1].decode()), token.encode()).decode()
    if unparse_name(name) != token:
        raise ValueError("not the only key of a name")
    return name
