"""The latest templates and options data of NetFlow v9 and IPFIX exporters, kept for collectors that join later. No I/O.

A collector can read flows only when it has their templates, which some exporters send every half hour. So the part of
each datagram that defines templates, or holds options data such as sampling rates and interface names, is kept until a
later one has replaced all of it. A datagram without flows is kept whole.
"""

import struct
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from services.ingest.flows.sets import IPFIX, SET_HEADER, TEMPLATE_SETS, V9, Template, read_templates, scopes_of

MAX_TEMPLATES: Final = 256
"""Templates kept of a domain."""
MAX_DOMAIN_BYTES: Final = 64 << 10
"""Bytes kept of a domain; the oldest go first, options data before templates."""
MAX_BYTES: Final = 16 << 20
"""Bytes kept of all domains of a stream, in each worker; the domain that was silent for longest goes first."""
PIECE_BYTES: Final = 512
"""Bytes that a piece takes beyond its own, about, and a domain beyond its pieces."""
KEY_BYTES: Final = 128
"""Likewise a key."""
MAX_AGE_NS: Final = 3600 * 10**9
"""Time after which what has not come again is dropped: a collector would have dropped it too (RFC 7011, 8.4)."""
_HEADER: Final = {V9: struct.Struct(">HHIIII"), IPFIX: struct.Struct(">HHIII")}
NUMBER_AT: Final = {V9: 12, IPFIX: 8}
"""Place of the number in a header."""
WRAP: Final = 0xFFFFFFFF

Key = int | tuple[int, bytes]
"""A template by its id; or a record of options data by its template and what it is about."""


class DefiningDatagram(NamedTuple):
    """A datagram that may define something: where it came from, its header's facts, its sets, and whether that is all.

    `sets` are those of templates and of what is known as options data, as they came, with their headers. `whole` says
    that there are no others. `records` is the count in the header of NetFlow v9. `seconds` and `uptime` are the
    exporter's clocks.
    """

    version: int
    address: bytes
    port: int
    domain: int
    number: int
    seconds: int
    uptime: int
    records: int
    received_ns: int
    sets: Sequence[bytes]
    whole: bool


class Ready(NamedTuple):
    """A datagram to be sent: from where, and its payload, which numbers it as if the exporter had just sent it.

    A collector that gets nothing else of that exporter is sent the number `aside`, and finds no gap. The payload's own
    number is `back` less than the exporter's next one. Records from before `since_ns` may be defined otherwise.
    """

    address: bytes
    port: int
    payload: bytes
    aside: int
    back: int = 0
    since_ns: int = 0


@dataclass(slots=True)
class Definitions:
    """The part of one datagram that defines: sets as they came, and the keys of which they are the latest.

    `count` is for the header of NetFlow v9. `records` are the numbers that it takes as a datagram of IPFIX.
    """

    body: bytes
    count: int
    records: int
    defines: bool
    seen_ns: int
    keys: int
    """The number of its keys when it came."""
    latest: set[Key] = field(default_factory=set)


@dataclass(slots=True)
class Domain:
    """All that is kept of one observation domain at one address and port: pieces in the order they came."""

    version: int
    id: int
    address: bytes
    port: int
    aside: int
    """The number due next where only its templates go."""
    since_ns: int = 0
    """The time at which a template last took the place of another, or the exporter began anew; 0: neither is known."""
    seconds: int = 0
    uptime: int = 0
    clock_ns: int = 0
    """The time at which it told these two."""
    size: int = PIECE_BYTES
    pieces: dict[int, Definitions] = field(default_factory=dict)
    by_body: dict[bytes, int] = field(default_factory=dict)
    latest: dict[Key, int] = field(default_factory=dict)
    """By key: the number of its piece."""
    templates: dict[int, Template] = field(default_factory=dict)
    options: set[int] = field(default_factory=set)
    """Ids of the options templates among them."""
    last: int = 0

    def recognize(self, arrived: DefiningDatagram) -> Definitions | None:
        """Return what is kept of a datagram if it defines the same as before, else None."""
        number = self.by_body.get(b"".join(arrived.sets))
        piece = None if number is None else self.pieces[number]
        if piece is None or len(piece.latest) < piece.keys:
            return None
        self._set_clock(arrived)
        piece.seen_ns = arrived.received_ns
        return piece

    def learn(self, arrived: DefiningDatagram) -> Definitions | None:
        """Keep what a datagram defines; return it, None when there is nothing."""
        keys: list[Key] = []
        parts, records, whole, defines = [], 0, arrived.whole, False
        for each in arrived.sets:
            found, number, content = [], int.from_bytes(each[:2]), each[SET_HEADER:]
            if number in TEMPLATE_SETS[self.version]:
                found += self._define(content, arrived.received_ns, options=number == TEMPLATE_SETS[self.version][1])
                defines |= bool(found)
            elif (template := self.templates.get(number)) and template.options:
                found += [(number, scope) for scope in scopes_of(content, template)]
                records += len(found)
            if found:
                keys += found
                parts.append(each)
            else:
                whole = False
        if not keys:
            return None
        self._set_clock(arrived)
        count = arrived.records if whole and self.version == V9 else len(keys)
        latest = set(keys)
        return self._keep(
            Definitions(b"".join(parts), count, records, defines, arrived.received_ns, len(latest)), latest
        )

    def _set_clock(self, arrived: DefiningDatagram) -> None:
        self.address, self.port = arrived.address, arrived.port
        self.seconds, self.uptime, self.clock_ns = arrived.seconds, arrived.uptime, arrived.received_ns

    def _define(self, content: bytes, received_ns: int, *, options: bool) -> list[Key]:
        """Learn the templates of a set; return their ids, none if it takes some back, or is not one of templates."""
        found = read_templates(content, options=options, version=self.version)
        for template in found:
            before = self.templates.get(template.id)
            if before is not None and before != template:
                self._forget(template.id)
                self.since_ns = received_ns
            if template.lengths:
                self.templates[template.id] = template
                if options:
                    self.options.add(template.id)
        while len(self.templates) > MAX_TEMPLATES:
            self._forget(next(iter(self.templates)))
        taken_back = not all(template.lengths for template in found)
        return [] if taken_back else [each.id for each in found if each.id in self.templates]

    def _keep(self, piece: Definitions, keys: set[Key]) -> Definitions:
        for key in keys:
            self._release(key)
        if (number := self.by_body.get(piece.body)) is not None:
            self._drop(number)
        self.last += 1
        self.latest.update(dict.fromkeys(keys, self.last))
        piece.latest = keys
        self.pieces[self.last], self.by_body[piece.body] = piece, self.last
        self.size += _size_of(piece)
        while self.size > MAX_DOMAIN_BYTES and self.pieces:
            data = (number for number, each in self.pieces.items() if not each.defines)
            self._drop(next(data, next(iter(self.pieces))))
        return piece

    def _forget(self, template: int) -> None:
        """Forget a template, and options data that it describes."""
        self._undefine(template)
        for key in [key for key in self.latest if key == template or (type(key) is tuple and key[0] == template)]:
            self._release(key)

    def _release(self, key: Key) -> None:
        """Forget the latest piece of a key; let go of the piece if it is the latest of no other key."""
        number = self.latest.pop(key, None)
        if number is None:
            return
        piece = self.pieces[number]
        piece.latest.discard(key)
        self.size -= KEY_BYTES
        if not piece.latest:
            self._drop(number)

    def _drop(self, number: int) -> None:
        piece = self.pieces.pop(number)
        del self.by_body[piece.body]
        self.size -= _size_of(piece)
        for key in piece.latest:
            del self.latest[key]
            if type(key) is int:
                self._undefine(key)

    def _undefine(self, template: int) -> None:
        self.templates.pop(template, None)
        self.options.discard(template)

    def expire(self, before_ns: int) -> None:
        """Drop what was last sent before a time."""
        for number in [number for number, piece in self.pieces.items() if piece.seen_ns < before_ns]:
            self._drop(number)

    def in_order(self) -> list[Definitions]:
        """Return the pieces in an order in which each record comes after its template."""
        return sorted(self.pieces.values(), key=lambda piece: not piece.defines)

    def takes(self, piece: Definitions) -> int:
        """Return the quantity of numbers that a piece takes as a datagram of its own."""
        return 1 if self.version == V9 else piece.records

    def datagram(self, piece: Definitions, number: int, now_ns: int) -> bytes:
        """Return a datagram with a piece, as the exporter would send it now."""
        passed = max(0, now_ns - self.clock_ns)
        seconds = self.seconds + passed // 10**9 & WRAP
        header = _HEADER[self.version]
        if self.version == V9:
            uptime = self.uptime + passed // 10**6 & WRAP
            return header.pack(V9, piece.count & 0xFFFF, uptime, seconds, number & WRAP, self.id) + piece.body
        return header.pack(IPFIX, header.size + len(piece.body), seconds, number & WRAP, self.id) + piece.body


class TemplateCache:
    """The domains of one stream, by the slot of their exporter."""

    def __init__(self) -> None:
        self._domains: OrderedDict[int, Domain] = OrderedDict()
        """The one that was silent for longest is the first."""
        self._forgotten: set[int] = set()
        """Slots of which something else was known before."""
        self.size = 0

    def __contains__(self, slot: int) -> bool:
        """Return whether anything is kept of an exporter."""
        return slot in self._domains

    def recognize(self, slot: int, arrived: DefiningDatagram) -> Definitions | None:
        """Return what is kept of a datagram if it defines the same as before, else None."""
        domain = self._domains.get(slot)
        if domain is None or (piece := domain.recognize(arrived)) is None:
            return None
        self._domains.move_to_end(slot)
        return piece

    def learn(self, slot: int, arrived: DefiningDatagram) -> Definitions | None:
        """Keep what a datagram defines; return it, None when there is nothing, or too much for a domain."""
        known = self._domains.get(slot)
        since_ns = arrived.received_ns if slot in self._forgotten else 0
        domain = known or Domain(
            *(arrived.version, arrived.domain, arrived.address, arrived.port, arrived.number), since_ns
        )
        size = known.size if known else 0
        piece = domain.learn(arrived)
        self.size += domain.size - size
        self._domains[slot] = domain
        self._domains.move_to_end(slot)
        if not domain.pieces:
            self.forget(slot)
        while self.size > MAX_BYTES:
            self.forget(next(iter(self._domains)))
        return piece if slot in self._domains else None

    @property
    def options(self) -> list[int]:
        """The data sets that are known as options data: slot and, in the lowest 16 bits, id."""
        return [slot << 16 | id for slot, domain in self._domains.items() for id in domain.options]

    def options_of(self, slot: int) -> frozenset[int]:
        """Return the ids of an exporter's options data."""
        return frozenset(self._domains[slot].options) if slot in self._domains else frozenset()

    def forget(self, slot: int) -> None:
        """Drop what is kept of an exporter: it has gone, was restarted, or sent what was not read."""
        self._forgotten.add(slot)
        if found := self._domains.pop(slot, None):
            self.size -= found.size

    def move(self, slot: int, to: int) -> None:
        """Keep an exporter under another slot, unless something is kept there already."""
        if slot in self._domains and to not in self._domains:
            self._domains[to] = self._domains.pop(slot)

    def renewal(self, slot: int, piece: Definitions, arrived: DefiningDatagram) -> Ready:
        """Return a datagram with what has just come, under its own number."""
        domain = self._domains[slot]
        payload = domain.datagram(piece, arrived.number, arrived.received_ns)
        ready = Ready(domain.address, domain.port, payload, domain.aside)
        domain.aside = domain.aside + domain.takes(piece) & WRAP
        return ready

    def number_aside_anew(self, due: Callable[[int], int]) -> None:
        """Let the numbers for those who get only templates go on where those of their exporters are now."""
        for slot, domain in self._domains.items():
            domain.aside = due(slot)

    def datagrams(self, now_ns: int, due: Callable[[int], int]) -> list[Ready]:
        """Return all that is kept as datagrams, numbered so that what their exporters send next continues them.

        `due` gives the number that a slot's exporter will send next.
        """
        found: list[Ready] = []
        for slot, domain in list(self._domains.items()):
            self.size -= domain.size
            domain.expire(now_ns - MAX_AGE_NS)
            self.size += domain.size
            if not domain.pieces:
                self.forget(slot)
            pieces, number = domain.in_order(), due(slot)
            back = sum(map(domain.takes, pieces))
            for piece in pieces:
                payload = domain.datagram(piece, number - back, now_ns)
                aside = domain.aside - back & WRAP
                found.append(Ready(domain.address, domain.port, payload, aside, back, domain.since_ns))
                back -= domain.takes(piece)
        return found


def _size_of(piece: Definitions) -> int:
    return PIECE_BYTES + len(piece.body) + len(piece.latest) * KEY_BYTES
