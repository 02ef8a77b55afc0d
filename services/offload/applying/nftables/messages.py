"""Changes of a table, as the messages of one transaction. No I/O."""

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from services.offload.applying.nftables.attributes import attribute, nested, number, text
from services.offload.applying.nftables.expressions import LIST_ELEMENT, MAP_NAME, Verdict, verdict_data

HEADER: Final = struct.Struct("=IHHII")
"""struct nlmsghdr: length, type, flags, sequence, port."""
FAMILY_HEADER: Final = struct.Struct(">BBH")
"""struct nfgenmsg: family, version, and a resource id, for a batch the subsystem."""
NFPROTO_NETDEV: Final = 5
SUBSYSTEM: Final = 10
"""NFNL_SUBSYS_NFTABLES."""
BATCH_BEGIN: Final = 0x10
BATCH_END: Final = 0x11
NEW_TABLE, DELETE_TABLE, NEW_CHAIN, DELETE_CHAIN, NEW_RULE, DELETE_RULE = 0, 2, 3, 5, 6, 8
NEW_SET, NEW_ELEMENTS, NEW_OBJECT, GET_OBJECT, DELETE_OBJECT = 9, 12, 18, 19, 20
REQUEST: Final = 0x01
ACKNOWLEDGE: Final = 0x04
DUMP: Final = 0x300
CREATE: Final = 0x400
APPEND: Final = 0x800
OWNER: Final = 2
"""NFT_TABLE_F_OWNER: nobody else can change the table, and it goes with the socket that made it (Linux 5.12)."""
COUNTER: Final = 1
"""NFT_OBJECT_COUNTER."""
CONSTANT_MAP: Final = 0x01 | 0x02 | 0x08
"""With no name of its own: it belongs to the one rule that uses it, and goes with it. In such a map alone may a range
begin where another ends (net/netfilter/nft_set_rbtree.c)."""
INTERVALS: Final = 0x04
VERDICTS: Final = 0xFFFFFF00
INTERVAL_END: Final = 1
TRANSACTION: Final = "transaction"
COMMENT_MAX: Final = 127
"""Bytes of a comment that nft(8) shows."""
ELEMENTS_SIZE: Final = 32_768
"""Bytes of elements in one message: the attribute that holds them has 16 bits for its length."""

Element = tuple[bytes, Verdict, str]
"""A key, and what a map says of it: a verdict and its chain."""


def message(kind: int, flags: int, sequence: int, attributes: bytes, family: int = NFPROTO_NETDEV) -> bytes:
    """Return one message of the subsystem."""
    size = HEADER.size + FAMILY_HEADER.size + len(attributes)
    header = HEADER.pack(size, SUBSYSTEM << 8 | kind, REQUEST | flags, sequence, 0)
    return header + FAMILY_HEADER.pack(family, 0, 0) + attributes


@dataclass(slots=True)
class Batch:
    """The changes of one table that are made together, or not at all."""

    table: str
    _maps: int = 0
    _messages: list[tuple[int, int, bytes, str]] = field(default_factory=list)
    """Kind, flags, attributes, and the words for what failed."""

    def __bool__(self) -> bool:
        """Return whether there is any change."""
        return bool(self._messages)

    def _add(self, kind: int, flags: int, about: str, *attributes: bytes) -> None:
        self._messages.append((kind, flags, b"".join((text(1, self.table), *attributes)), about))

    def add_table(self) -> None:
        """Make the table, owned by the socket that sends this."""
        self._add(NEW_TABLE, CREATE, "table", number(2, OWNER))

    def delete_table(self) -> None:
        """Remove the table with all that is in it."""
        self._add(DELETE_TABLE, 0, "table")

    def add_base_chain(self, name: str, interface: str, priority: int) -> None:
        """Make a chain that sees what arrives by an interface."""
        hook = nested(4, number(1, 0), number(2, priority), text(3, interface))
        about = f"interface {interface}"
        self._add(NEW_CHAIN, CREATE, about, text(3, name), hook, number(5, Verdict.ACCEPT), text(7, "filter"))

    def add_chain(self, name: str) -> None:
        """Make a chain to which others lead."""
        self._add(NEW_CHAIN, CREATE, f"chain {name}", text(3, name))

    def delete_chain(self, name: str) -> None:
        """Remove a chain with its rules, once nothing leads to it."""
        self._add(DELETE_CHAIN, 0, f"chain {name}", text(3, name))

    def flush_chain(self, name: str) -> None:
        """Remove the rules of a chain."""
        self._add(DELETE_RULE, 0, f"chain {name}", text(2, name))

    def add_rule(self, chain: str, *expressions: bytes, comment: str = "") -> None:
        """Put a rule behind those of a chain."""
        noted = comment.encode()[:COMMENT_MAX].decode(errors="ignore").encode() + b"\0"
        userdata = attribute(7, bytes((0, len(noted))) + noted) if comment else b""
        about = f"rule {chain} {comment}"
        self._add(NEW_RULE, CREATE | APPEND, about, text(2, chain), nested(4, *expressions), userdata)

    def add_map(self, key_length: int, elements: Sequence[Element]) -> int:
        """Make a map from values to verdicts, for the next rule; return the number by which that one uses it."""
        return self._add_map(key_length, CONSTANT_MAP, [_element(*each) for each in elements])

    def add_ranges(self, key_length: int, ranges: Iterable[tuple[int, Element | None]]) -> int:
        """Make a map from ranges to verdicts: each begins at a number, and ends where the next one does.

        An element whose place is None ends the one before it: the map says nothing there.
        """
        elements = [
            nested(LIST_ELEMENT, nested(1, attribute(1, start.to_bytes(key_length, "big"))), number(3, INTERVAL_END))
            if element is None
            else _element(*element)
            for start, element in ranges
        ]
        return self._add_map(key_length, CONSTANT_MAP | INTERVALS, elements)

    def _add_map(self, key_length: int, flags: int, elements: list[bytes]) -> int:
        self._maps += 1
        name, identity = text(2, MAP_NAME), self._maps
        described = (number(3, flags), number(4, 0), number(5, key_length), number(6, VERDICTS), number(7, 0))
        size = nested(9, number(1, max(1, len(elements))))
        self._add(NEW_SET, CREATE, "map", name, *described, number(10, identity), size)
        for portion in _portions(elements):
            self._add(NEW_ELEMENTS, CREATE, "map", name, number(4, identity), nested(3, *portion))
        return identity

    def add_counter(self, name: str) -> None:
        """Make a counter, or leave the one of this name as it is."""
        self._add(NEW_OBJECT, CREATE, f"counter {name}", text(2, name), number(3, COUNTER), nested(4))

    def delete_counter(self, name: str) -> None:
        """Remove a counter, once no rule uses it."""
        self._add(DELETE_OBJECT, 0, f"counter {name}", text(2, name), number(3, COUNTER))

    def encode(self, first: int) -> tuple[bytes, list[str]]:
        """Return the transaction, whose messages are numbered from `first` on, and what each number is about.

        The last change is the one that the kernel acknowledges.
        """
        about = [TRANSACTION, *(words for *_, words in self._messages), TRANSACTION]
        end = len(self._messages)
        whole = [_mark(BATCH_BEGIN, first)]
        for number_, (kind, flags, attributes, _) in enumerate(self._messages, 1):
            whole.append(message(kind, flags | (ACKNOWLEDGE if number_ == end else 0), first + number_, attributes))
        return b"".join([*whole, _mark(BATCH_END, first + end + 1)]), about


def _mark(kind: int, sequence: int) -> bytes:
    header = HEADER.pack(HEADER.size + FAMILY_HEADER.size, kind, REQUEST, sequence, 0)
    return header + FAMILY_HEADER.pack(0, 0, SUBSYSTEM)


def _portions(elements: Iterable[bytes]) -> Iterator[list[bytes]]:
    """Yield the elements in portions that fit into an attribute."""
    portion: list[bytes] = []
    size = 0
    for element in elements:
        if portion and size + len(element) > ELEMENTS_SIZE:
            yield portion
            portion, size = [], 0
        portion.append(element)
        size += len(element)
    if portion:
        yield portion


def _element(key: bytes, verdict: Verdict, chain: str) -> bytes:
    return nested(LIST_ELEMENT, nested(1, attribute(1, key)), nested(2, verdict_data(verdict, chain)))
