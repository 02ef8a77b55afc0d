"""The rules of a plan: chains and maps of one table, as changes of a transaction. No I/O.

A chain on each interface finds whole UDP datagrams for our listeners, by one look at a map of addresses and ports, and
goes to the chain of their stream. There what the kernel is not to copy goes on unmarked. The copies of all others are
made: a rule writes the headers of a copy, counts it and sends it, several times over, and at last writes the datagram's
own headers back. The datagram goes on to its listener with the mark of the generation; one of an unseen stream becomes
the last copy itself.
"""

import random
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from services.offload.applying.copy_rules import REGISTER, make_copies, most_in_a_rule
from services.offload.applying.nftables.expressions import (
    R0,
    Base,
    Meta,
    Op,
    Verdict,
    bitwise,
    compare,
    count,
    decide,
    hash_values,
    immediate,
    load,
    load_meta,
    look_up,
    store_meta,
)
from services.offload.applying.nftables.messages import Batch, Element
from services.offload.kernel_plan import Copy, KernelPlan, Prefix, StreamCopies, buckets_of, teams_of
from services.offload.source_classes import divide
from shared.datagrams.limits import BUCKETS
from shared.net.addresses import V4_MAPPED

PRIORITY: Final = 0
ADDRESS_OFFSET: Final = {4: (12, 16, 4), 6: (8, 24, 16)}
"""By IP version: the offsets of source and destination in the header, and their length."""
REFUSED: Final = -1
ALLOWED: Final = -2
"""Places, beside those of copies, of the sources that are not copied, and of the only ones that are."""


Chains = dict[tuple[Copy, ...], str]
"""Names of chains by the copies that they make."""
Said = tuple[Verdict, str] | None
"""A map's word on a range of sources."""


@dataclass(frozen=True, slots=True)
class Sources:
    """The sources whose datagrams the kernel is not to copy: they go up to those who count them.

    `nobodys` never; `local` and all but `allowed` (empty: nothing) not where a copy keeps the exporter's address.
    """

    nobodys: tuple[Prefix, ...] = ()
    local: tuple[Prefix, ...] = ()
    allowed: tuple[Prefix, ...] = ()


@dataclass(slots=True)
class Marks:
    """The bits of a mark that are ours."""

    mask: int
    shift: int

    def clear(self) -> bytes:
        """Return the instructions that take our bits from a UDP packet for this host that comes with them.

        Ingest would read them as a generation of ours. It has those of fragments too, which no other rule is for.
        """
        ours, others = struct.pack("=I", self.mask), struct.pack("=I", ~self.mask & 0xFFFFFFFF)
        has_ours = (
            load_meta(Meta.MARK, R0) + bitwise(R0, R0 + 1, ours, bytes(4)) + compare(R0 + 1, bytes(4), Op.NOT_EQUAL)
        )
        is_udp = load_meta(Meta.PROTOCOL, R0 + 1) + compare(R0 + 1, b"\x11")
        return (
            has_ours + _for_this_host(R0 + 1) + is_udp + bitwise(R0, R0, others, bytes(4)) + store_meta(Meta.MARK, R0)
        )

    def set_to(self, generation: int) -> bytes:
        """Return the instructions that mark a packet, and leave all other bits."""
        kept, ours = struct.pack("=I", ~self.mask & 0xFFFFFFFF), struct.pack("=I", generation << self.shift & self.mask)
        return load_meta(Meta.MARK, R0) + bitwise(R0, R0, kept, ours) + store_meta(Meta.MARK, R0)


def counter_names(plan: KernelPlan) -> dict[int, str]:
    """Return the name of each counter of a plan by its number."""
    numbers = [copy.counter for copy in plan.copies] + [stream.counter for stream in plan.streams]
    return {number: f"c{number}" for number in numbers}


class Renderer:
    """Puts the rules of one plan into two transactions.

    `known` are chains of the plan before, by the copies that they make: those that this plan needs too stay as they
    are, and count on in their samples. `used` are those of this plan, `streams` the other chains of it, `counters` the
    names of its counters.
    """

    def __init__(
        self, batch: Batch, plan: KernelPlan, serial: int, marks: Marks, sources: Sources, known: Chains | None = None
    ) -> None:
        self.used: Chains = {}
        self.streams: list[str] = []
        self._goals: dict[int, list[Element]] = {}
        """By IP version: the listeners, and the chains of their streams."""
        self._batch = batch
        self._plan = plan
        self._serial = serial
        self._marks = marks
        self._sources = sources
        self._known = known or {}
        self._counters = counter_names(plan)
        self.counters = frozenset(self._counters.values())

    def add_streams(self) -> None:
        """Add everything to which `lead` leads."""
        for stream in self._plan.streams:
            version = _version(stream)
            chain = self._add_stream(stream, version)
            found = self._goals.setdefault(version, [])
            found += [(_pad(each.address, each.port), Verdict.GOTO, chain) for each in stream.listeners]

    def lead(self, batch: Batch, base_chains: Iterable[str]) -> None:
        """Let base chains, which are empty, lead to it, in a transaction after the one that has added it."""
        for chain in base_chains:
            batch.add_rule(chain, self._marks.clear())
            for version, goals in self._goals.items():
                listeners = batch.add_map(len(goals[0][0]), goals)
                batch.add_rule(chain, _find_listener(version, listeners))

    def _add_stream(self, stream: StreamCopies, version: int) -> str:
        copies = {place: self._plan.copies[place] for place in stream.copies}
        chain = f"{stream.name}.ipv{version}-{self._serial}"
        self._batch.add_chain(chain)
        self.streams.append(chain)
        classes = self._add_classes(copies, version)
        if stream.longest:
            self._batch.add_rule(chain, _let_longer_go_up(stream.longest, version))
        if classes:
            source, _, length = ADDRESS_OFFSET[version]
            sources = self._batch.add_ranges(length, classes)
            self._batch.add_rule(chain, load(Base.NETWORK, source, length, R0), look_up(R0, sources))
        general = [copy for copy in copies.values() if not copy.prefixes]
        kept = [[copy] for copy in general if copy.sample > 1 and not copy.share]
        for some in (*kept, *teams_of(general)):  # in chains of their own, which later plans need not make anew
            self._batch.add_rule(chain, decide(Verdict.JUMP, self._chain_of(some, version)))
        plain = [copy for copy in general if copy.sample == 1 and not copy.share]
        counted = count(self._counters[stream.counter])
        if stream.unseen:
            self._batch.add_rule(chain, counted)
            self._add_copies(chain, plain, version, use_up=True)
            self._batch.add_rule(chain, decide(Verdict.DROP))
        else:
            self._add_copies(chain, plain, version)
            self._batch.add_rule(chain, self._marks.set_to(stream.generation), counted)
        return chain

    def _add_classes(self, copies: dict[int, Copy], version: int) -> list[tuple[int, Element | None]]:
        """Add a chain for each set of copies that some sources are for; return the ranges of sources, by number."""
        original = any(not copy.source for copy in copies.values())
        length = ADDRESS_OFFSET[version][2]
        prefixes: dict[int, Sequence[Prefix]] = {
            place: copy.prefixes for place, copy in copies.items() if copy.prefixes
        }
        prefixes[REFUSED] = (*self._sources.nobodys, *(self._sources.local if original else ()))
        limited = original and bool(self._sources.allowed)
        prefixes[ALLOWED] = self._sources.allowed if limited else ()
        ranges: list[tuple[int, Element | None]] = []
        said: Said = None
        for start, places in divide(prefixes, length * 8):
            wanted = sorted(places - {ALLOWED})
            if REFUSED in places or (limited and ALLOWED not in places):
                says: Said = Verdict.ACCEPT, ""
            else:
                says = (Verdict.JUMP, self._chain_of([copies[place] for place in wanted], version)) if wanted else None
            if not ranges or says != said:
                ranges.append((start, (start.to_bytes(length, "big"), *says) if says else None))
            said = says
        return ranges if any(element for _, element in ranges) else []

    def _chain_of(self, copies: Sequence[Copy], version: int) -> str:
        """Return the chain that makes these copies; add it unless it is there."""
        key = tuple(copies)
        for inner in _inner_chains(copies):
            self._chain_of(inner, version)  # first: a chain is there before those that lead to it
        chain = self.used.get(key) or self._known.get(key)
        if chain is None:
            chain = f"copies-{self._serial}.{len(self.used)}"
            self._batch.add_chain(chain)
            self._add_copies(chain, copies, version)
        self.used[key] = chain
        return chain

    def _add_copies(self, chain: str, copies: Sequence[Copy], version: int, *, use_up: bool = False) -> None:
        teams = teams_of(copies)
        if teams == [[*copies]]:
            chains = {copy: self._chain_of([_without_share(copy)], version) for copy in copies}
            shares = [
                (struct.pack("=I", bucket), Verdict.JUMP, chains[copy])
                for copy in copies
                for bucket in buckets_of(copy.share)
            ]
            members = self._batch.add_map(REGISTER, shares)
            self._batch.add_rule(chain, _find_bucket(version), look_up(R0, members))
            return
        for team in teams:
            self._batch.add_rule(chain, decide(Verdict.JUMP, self._chain_of(team, version)))
        copies = [copy for copy in copies if not copy.share]
        groups = list(_groups(copies, most_in_a_rule(version)))
        for group in groups:
            phase = random.randrange(group[0].sample)  # so no datagram is favoured, however often a chain is made anew
            made = make_copies(group, self._counters, phase, use_up=use_up and group is groups[-1])
            self._batch.add_rule(chain, made, comment=" ".join(copy.name for copy in group))


def _version(stream: StreamCopies) -> int:
    return 4 if len(stream.listeners[0].address) == 4 else 6


def _inner_chains(copies: Sequence[Copy]) -> list[list[Copy]]:
    """Return the copies of each chain that the chain of these leads to."""
    teams = teams_of(copies)
    return [[_without_share(copy)] for copy in copies] if teams == [[*copies]] else teams


def _without_share(copy: Copy) -> Copy:
    return msgspec.structs.replace(copy, share=b"")


def _find_bucket(version: int) -> bytes:
    """Find the bucket of the source, as the senders do: of 16 bytes, for IPv4 of the address mapped into IPv6."""
    source, _, length = ADDRESS_OFFSET[version]
    mapped = immediate(R0, V4_MAPPED) if version == 4 else b""
    address = load(Base.NETWORK, source, length, R0 + (16 - length) // REGISTER)
    return mapped + address + hash_values(R0, 16, R0, BUCKETS)


def _pad(address: bytes, port: int) -> bytes:
    """Return the key of a listener: each part fills its last register."""
    return address + port.to_bytes(2, "big") + bytes(2)


def _find_listener(version: int, listeners: int) -> bytes:
    """Go to the chain of a stream with a whole datagram, without options, that came to this host for its listener."""
    _, destination, length = ADDRESS_OFFSET[version]
    came = _for_this_host(R0)
    if version == 4:
        # With a VLAN tag the ethertype is another one: its datagrams are for the VLAN's own interface.
        whole = load(Base.LINK, 12, 2, R0) + compare(R0, b"\x08\x00")
        whole += load(Base.NETWORK, 0, 1, R0) + compare(R0, b"\x45")
        # No more fragments, offset 0; any time to live; UDP.
        whole += load(Base.NETWORK, 6, 4, R0) + bitwise(R0, R0, b"\x3f\xff\x00\xff", bytes(4))
        whole += compare(R0, b"\x00\x00\x00\x11")
    else:
        whole = load(Base.LINK, 12, 2, R0) + compare(R0, b"\x86\xdd")
        whole += load(Base.NETWORK, 6, 1, R0) + compare(R0, b"\x11")
    key = load(Base.NETWORK, destination, length, R0) + load(Base.TRANSPORT, 2, 2, R0 + length // 4)
    return came + whole + key + look_up(R0, listeners)


def _for_this_host(register: int) -> bytes:
    """End the rule for what a promiscuous link has seen: other types than PACKET_HOST."""
    return load_meta(Meta.PACKET_TYPE, register) + compare(register, b"\0")


def _let_longer_go_up(longest: int, version: int) -> bytes:
    """Leave alone what no copy of could leave in one piece."""
    offset, counted = (2, longest) if version == 4 else (4, longest - 40)  # IPv6 does not count its header
    length = load(Base.NETWORK, offset, 2, R0)
    return length + compare(R0, counted.to_bytes(2, "big"), Op.GREATER) + decide(Verdict.ACCEPT)


def _groups(copies: Sequence[Copy], most: int) -> Iterator[list[Copy]]:
    """Yield copies that one rule makes; one that samples has a rule of its own."""
    together: list[Copy] = []
    for copy in copies:
        if copy.sample > 1:
            yield [copy]
        else:
            together.append(copy)
    for begin in range(0, len(together), most):
        yield together[begin : begin + most]
