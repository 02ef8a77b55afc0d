"""The count that each worker had reached when a segment began, as an option of the segment's first block. No I/O.

So the newest segment tells it of all workers, also of those that have nothing in it.
"""

import struct
import zlib
from collections.abc import Mapping
from itertools import islice
from typing import Final

from shared.capture.pcapng import CUSTOM_BYTES, SECTION, make_option
from shared.journal.records import ENTERPRISE, Reached

MAGIC: Final = b"fanwire\x02"
_START: Final = struct.Struct("<4s8sI")
"""Enterprise number, magic, and a CRC of what follows."""
_WORKER: Final = struct.Struct("<QQB")
"""Boot, count reached, and the length of the name that follows."""
MAX_WORKERS: Final = 256
"""Workers that are told of: far more than a host has; and with names of any length within an option."""
_OPTIONS_AT: Final = 24
"""Place of the options in the block that a section begins with."""


def reached_option(reached: Mapping[str, Reached]) -> bytes:
    """Return the option, with its head."""
    parts = []
    for worker, each in islice(reached.items(), MAX_WORKERS):
        name = worker.encode()
        parts.append(_WORKER.pack(each.boot, each.total, len(name)) + name)
    told = b"".join(parts)
    return make_option(CUSTOM_BYTES, _START.pack(ENTERPRISE, MAGIC, zlib.crc32(told)) + told)


def parse_reached(block: bytes) -> dict[str, Reached] | None:
    """Return what the first block of a segment tells; None: it is damaged, or tells nothing."""
    if len(block) < _OPTIONS_AT or struct.unpack_from("<I", block)[0] != SECTION:
        return None
    at = _OPTIONS_AT
    while at + 4 <= len(block):
        code, size = struct.unpack_from("<HH", block, at)
        value = block[at + 4 : at + 4 + size]
        if code == CUSTOM_BYTES and size >= _START.size and value[4:12] == MAGIC:
            return _parse(value)
        at += 4 + size + -size % 4
    return None


def _parse(value: bytes) -> dict[str, Reached] | None:
    told, found = value[_START.size :], dict[str, Reached]()
    if zlib.crc32(told) != _START.unpack_from(value)[2]:
        return None
    at = 0
    while at < len(told):
        boot, total, size = _WORKER.unpack_from(told, at)
        at += _WORKER.size + size
        found[str(told[at - size : at], "utf-8")] = Reached(boot, total)
    return found
