"""The sets of NetFlow v9 and IPFIX datagrams, and the templates that they define (RFC 3954, 5; RFC 7011, 3.3). No I/O.

NetFlow v9 calls a set a *flowset*. Both begin with an id and a length, so one walk serves both.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from shared.datagrams.export_headers import Bytes, Integers, gather

SET_HEADER: Final = 4
FIRST_DATA: Final = 256
V9, IPFIX = 9, 10
TEMPLATE_SETS: Final = {V9: (0, 1), IPFIX: (2, 3)}
"""Ids of sets of templates and of options templates, by version."""
VARIABLE: Final = 0xFFFF
"""The length of a field that gives its own, in IPFIX."""
LONG: Final = 0xFF
"""Begins a field whose length is in the two bytes behind it (RFC 7011, 7)."""
ENTERPRISE: Final = 0x80
"""Marks, in the first byte, a field that four more bytes describe, in IPFIX."""
MAX_RECORDS: Final = 512
"""Records of options data read of a set: real ones are longer than a few bytes."""
MAX_SETS: Final = 16
"""Sets of a datagram that are read: empty ones are four bytes."""


@dataclass(frozen=True, slots=True)
class Sets:
    """The sets of some datagrams: the datagram of each, its id, and its content in the buffer. All int64, shape (n,).

    All first ones come first, then all second ones. `whole`, a mask, tells which datagrams have no more than these.
    """

    owner: Integers
    id: Integers
    start: Integers
    stop: Integers
    whole: npt.NDArray[np.bool_]


def walk_sets(buffer: Bytes, start: Integers, length: Integers, header: int) -> Sets:
    """Find the sets of all datagrams that stand at `start` in a buffer, behind headers of `header` bytes."""
    whole = np.ones(len(start), bool)
    owner, at, end = np.arange(len(start)), start + header, start + length
    found: list[tuple[Integers, ...]] = []
    for _ in range(MAX_SETS):
        more = at < end
        owner, at, end = owner[more], at[more], end[more]
        if not len(owner):
            break
        head = gather(buffer, at, SET_HEADER).view(">u2").astype(np.int64)
        size = head[:, 1]
        sound = (at + SET_HEADER <= end) & (size >= SET_HEADER) & (at + size <= end)
        whole[owner[~sound]] = False
        owner, at, end, size = owner[sound], at[sound], end[sound], size[sound]
        found.append((owner, head[sound, 0], at + SET_HEADER, at + size))
        at = at + size
    whole[owner[at < end]] = False
    none = [np.zeros(0, np.int64)] * 4
    owners, ids, starts, stops = [np.concatenate(column) for column in zip(*found, strict=True)] if found else none
    return Sets(owners, ids, starts, stops, whole)


@dataclass(frozen=True, slots=True)
class Template:
    """A template: the lengths of its fields, of which the first `scopes` say what an options record is about.

    Without fields it takes back the template of that id (RFC 7011, 8.1).
    """

    id: int
    lengths: tuple[int, ...]
    scopes: int
    options: bool

    @property
    def record_length(self) -> int:
        """The length of a record; 0 where it varies."""
        return 0 if VARIABLE in self.lengths else sum(self.lengths)


def read_templates(content: bytes, *, options: bool, version: int = IPFIX) -> list[Template]:
    """Return the complete templates of a set; anything else in it, such as padding, ends them."""
    found: list[Template] = []
    at, header = 0, 6 if options else 4
    while at + 4 <= len(content):
        template, fields = int.from_bytes(content[at : at + 2]), int.from_bytes(content[at + 2 : at + 4])
        scopes = int.from_bytes(content[at + 4 : at + 6]) if options else 0
        if version == V9 and options:  # here they are the bytes of the scopes' and of the other fields' descriptions
            fields, scopes = (fields + scopes) // 4, fields // 4
        at += header if fields else 4
        lengths = []
        for _ in range(fields):
            if at + 4 > len(content):
                return found
            lengths.append(int.from_bytes(content[at + 2 : at + 4]))
            at += 8 if version == IPFIX and content[at] & ENTERPRISE else 4
        if template < FIRST_DATA or at > len(content) or scopes > fields:
            return found
        found.append(Template(template, tuple(lengths), scopes, options))
    return found


def scopes_of(content: bytes, template: Template) -> list[bytes]:
    """Return what each complete record of a data set is about: its scope fields, as they are in the set.

    Return nothing where there are more than `MAX_RECORDS`.
    """
    if length := template.record_length:
        if len(content) // length > MAX_RECORDS:
            return []
        scope = sum(template.lengths[: template.scopes])
        return [content[at : at + scope] for at in range(0, len(content) - length + 1, length)]
    found: list[bytes] = []
    at = 0
    while at < len(content):
        begin, scope = at, at
        for number, length in enumerate(template.lengths):
            if length == VARIABLE:
                length, at = _variable(content, at)
            at += length
            if number + 1 == template.scopes:
                scope = at
        if at > len(content) or at == begin:
            break
        if len(found) == MAX_RECORDS:
            return []
        found.append(content[begin:scope])
    return found


def _variable(content: bytes, at: int) -> tuple[int, int]:
    """Return the length of a field that gives its own, and the place behind that."""
    short = content[at] if at < len(content) else 0
    if short < LONG:
        return short, at + 1
    return int.from_bytes(content[at + 1 : at + 3]), at + 3
