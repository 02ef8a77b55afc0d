"""Input from exporters: streams of TCP, and the datagrams whose numbers show losses."""

from collections import Counter
from collections.abc import Callable
from itertools import groupby
from typing import Final, NamedTuple

import numpy as np

from services.ingest.flows.exporters import ExporterTracker
from services.ingest.flows.ipfix_templates import MAX_TEMPLATES, TemplateTable
from services.ingest.flows.sequence_gaps import MAX_GAP
from services.ingest.flows.sets import FIRST_DATA, MAX_SETS, SET_HEADER, read_templates, walk_sets
from services.ingest.flows.template_cache import MAX_BYTES
from services.ingest.octet_count_framing import Framing
from shared.datagrams.export_headers import AGENT_WORDS, IPFIX_HEADER
from shared.datagrams.limits import MAX_DATAGRAM
from shared.net.addresses import pack_address, unpack_address
from shared.settings.entries import Protocol
from tests.services.ingest.flows.test_sequence_gaps import Reference, batch_of

MAX_ARRIVALS: Final = 64
SOURCES: Final = ("192.0.2.1", "192.0.2.2", "2001:db8::1", "::ffff:0:0")
NEW_CALL, SETTLED = 4, 8
"""Bits of the byte before a datagram: it came by another receive call; a second had passed. The lowest two: its source.
"""
MISSED: Final = ("exporter_missed", "exporter_missed_flows", "exporter_missed_records")


def tcp_messages(data: bytes) -> None:
    """A TCP stream, in two reads, is cut into messages that a datagram can hold, none of them made up."""
    framing, at = Framing(), data[0] if data else 0
    messages = [*framing.feed(data[:at]), *framing.feed(data[at:]), *framing.finish()]
    assert all(1 <= len(message) <= MAX_DATAGRAM and message in data for message in messages)


class Arrival(NamedTuple):
    """A datagram, and how it came."""

    source: str
    payload: bytes
    call: int
    """Of which receive call."""
    settled: bool


def join_arrivals(arrivals: list[tuple[int, bytes]]) -> bytes:
    """Datagrams, each with its bits, as one input; `split_arrivals` is the way back."""
    return b"".join(bytes([bits]) + len(payload).to_bytes(2) + payload for bits, payload in arrivals)


def split_arrivals(data: bytes) -> list[Arrival]:
    """A byte of bits, two of length, and the datagram; the last takes what is left."""
    arrivals: list[Arrival] = []
    call = 0
    while data and len(arrivals) < MAX_ARRIVALS:
        bits, size = data[0], int.from_bytes(data[1:3])
        call += bool(bits & NEW_CALL)
        arrivals.append(Arrival(SOURCES[bits & 3], data[3 : 3 + size], call, bool(bits & SETTLED)))
        data = data[3 + size :]
    return arrivals


def _calls(arrivals: list[Arrival]) -> list[list[Arrival]]:
    return [list(call) for _, call in groupby(arrivals, lambda arrival: (arrival.call, arrival.settled))]


def _observe(protocol: Protocol, arrivals: list[Arrival], *, apart: int = 0, capacity: int) -> Counter[str]:
    """Return the counts, which are never above what there can be; in memory datagrams may stand this far apart."""
    account: Counter[str] = Counter()
    exporters = ExporterTracker(protocol, account, capacity)
    with np.errstate(all="raise"):
        for call in _calls(arrivals):
            if call[0].settled:
                exporters.settle()
            exporters.observe(batch_of([(arrival.source, arrival.payload) for arrival in call], apart))
        exporters.settle(at_once=True)
    followed = len(arrivals) - account["not_flow"]
    assert 0 <= followed <= len(arrivals)
    assert min(1, followed) <= account["exporters"] <= min(capacity, followed)
    assert all(0 <= count <= followed for name, count in account.items() if name not in (*MISSED, "not_flow"))
    assert all(0 <= account[name] <= followed * MAX_GAP for name in MISSED)
    begun = account["exporters"] + account["exporter_evictions"]
    assert account["exporter_reordered"] + account["exporter_restarts"] <= followed - begun
    return account


def _account(protocol: Protocol, arrivals: list[Arrival]) -> Counter[str]:
    """Return the counts where all exporters can be followed: the same however the datagrams stand in memory."""
    account = _observe(protocol, arrivals, capacity=MAX_ARRIVALS)
    longest = max((len(arrival.payload) for arrival in arrivals), default=0)
    assert account == _observe(protocol, arrivals, apart=longest + 7, capacity=MAX_ARRIVALS)
    most = max(map(len, _calls(arrivals)), default=1)
    assert account["not_flow"] == _observe(protocol, arrivals, capacity=most)["not_flow"]
    return account


class Flow(NamedTuple):
    """The facts of a datagram: its exporter, its number, the numbers it takes, the uptime, and what is counted."""

    source: str
    key: object
    number: int
    takes: int
    uptime: int
    unit: str = "exporter_missed"


def _read_netflow(source: str, payload: bytes) -> Flow | None:
    version, count = int.from_bytes(payload[:2]), int.from_bytes(payload[2:4])
    uptime = int.from_bytes(payload[4:8])
    if version == 5 and count and len(payload) == 24 + 48 * count:
        key = (source, version, payload[20:22])
        return Flow(source, key, int.from_bytes(payload[16:20]), count, uptime, "exporter_missed_flows")
    if version == 9 and len(payload) >= 20:
        return Flow(source, (source, version, payload[16:20]), int.from_bytes(payload[12:16]), 1, uptime)
    return None


def _read_sflow(source: str, payload: bytes) -> Flow | None:
    version, kind = int.from_bytes(payload[:4]), int.from_bytes(payload[4:8])
    end = 8 + 4 * AGENT_WORDS.get(kind, 0)
    if version != 5 or kind not in AGENT_WORDS or len(payload) < end + 16:
        return None
    number, uptime = int.from_bytes(payload[end + 4 : end + 8]), int.from_bytes(payload[end + 8 : end + 12])
    return Flow(source, (kind, payload[8 : end + 4]), number, 1, uptime)


def _as_one_by_one(protocol: Protocol, data: bytes, read: Callable[[str, bytes], Flow | None]) -> None:
    """Check that a plain loop over the datagrams counts the same, if nothing is settled before the end."""
    arrivals = split_arrivals(data)
    account = _account(protocol, arrivals)
    flows = [flow for arrival in arrivals if (flow := read(arrival.source, arrival.payload))]
    references: dict[object, Reference] = {flow.key: Reference(flow.unit) for flow in flows}
    assert account["not_flow"] == len(arrivals) - len(flows)
    assert len(references) <= account["exporters"] <= len({(flow.key, flow.source) for flow in flows})
    if any(arrival.settled for arrival in arrivals) or len({(flow.key, flow.source) for flow in flows}) > len(
        references
    ):
        return  # several sources of one exporter are followed apart until they turn out to number as one
    for flow in flows:
        references[flow.key].take(flow.number, flow.takes, flow.uptime, sure=True)
    for reference in references.values():
        reference.finish()
    expected = sum((reference.counts for reference in references.values()), Counter())
    for counter in (*MISSED, "exporter_reordered", "exporter_restarts"):
        assert account[counter] == expected[counter], counter


def netflow(data: bytes) -> None:
    """Datagrams of NetFlow exporters count as a plain loop counts them."""
    _as_one_by_one("netflow", data, _read_netflow)


def sflow(data: bytes) -> None:
    """Datagrams of sFlow agents count as a plain loop counts them."""
    _as_one_by_one("sflow", data, _read_sflow)


def ipfix(data: bytes) -> None:
    """Datagrams of IPFIX exporters: one a call, the records of each are counted as a plain loop counts them."""
    arrivals = split_arrivals(data)
    _account("ipfix", arrivals)
    templates: dict[int, int] = {}
    counted = TemplateTable()
    for arrival in arrivals:
        batch = batch_of([(arrival.source, arrival.payload)])
        start, length, buffer = np.array([0]), batch.lengths, np.frombuffer(arrival.payload, np.uint8)
        counts, sure = counted.count(buffer, walk_sets(buffer, start, length, IPFIX_HEADER), np.array([0]))
        assert (int(counts[0]), bool(sure[0])) == _count_records(arrival.payload, templates)
        assert 0 <= counts[0] <= len(arrival.payload)


def _count_records(payload: bytes, templates: dict[int, int]) -> tuple[int, bool]:
    """Count as `Templates.count` does for one datagram; `templates` are those learned so far, and grow."""
    sets, whole = _sets(payload)
    changed = set()
    for number, content in sets:
        if number in (2, 3):
            for each in read_templates(content, options=number == 3):
                template, length = each.id, each.record_length
                if templates.get(template, length) != length:
                    changed.add(template)
                if template in templates or len(templates) < MAX_TEMPLATES:
                    templates[template] = length
    counts = 0
    for number, content in sets:
        if number >= FIRST_DATA:
            length = 0 if number in changed else templates.get(number, 0)
            counts += len(content) // length if length else 0
            whole &= length > 0
    return counts, whole


def _sets(payload: bytes) -> tuple[list[tuple[int, bytes]], bool]:
    """Number and content of each set, and whether that is all there is."""
    sets: list[tuple[int, bytes]] = []
    at = IPFIX_HEADER
    while at < len(payload):
        number, size = int.from_bytes(payload[at : at + 2]), int.from_bytes(payload[at + 2 : at + 4])
        if len(sets) == MAX_SETS or at + SET_HEADER > len(payload) or not SET_HEADER <= size <= len(payload) - at:
            return sets, False
        sets.append((number, payload[at + SET_HEADER : at + size]))
        at += size
    return sets, True


def templates(data: bytes) -> None:
    """Templates kept of NetFlow v9 and IPFIX came from their exporters, are bounded, and can be read again."""
    arrivals = split_arrivals(data)
    for protocol in ("netflow", "ipfix"):
        exporters = ExporterTracker(protocol, Counter(), MAX_ARRIVALS)
        exporters.templates.renewing = True
        with np.errstate(all="raise"):
            for call in _calls(arrivals):
                exporters.observe(batch_of([(arrival.source, arrival.payload) for arrival in call]))
                _check_kept(exporters, arrivals)


def _check_kept(exporters: ExporterTracker, arrivals: list[Arrival]) -> None:
    kept = exporters.kept_templates(0)
    cache = exporters.templates.cache
    assert cache.size <= MAX_BYTES
    assert sum(len(ready.payload) for ready in kept) <= cache.size
    for ready in (*kept, *exporters.templates.renewals):
        header = 20 if ready.payload[:2] == b"\x00\x09" else 16
        sets = ready.payload[header:]
        assert any(_holds(arrival, ready.address, sets) for arrival in arrivals)
        anew = ExporterTracker("netflow" if header == 20 else "ipfix", Counter(), 1)
        anew.observe(batch_of([(unpack_address(ready.address), ready.payload)]))
        assert not anew.templates.cache.size or anew.kept_templates(0)


def _holds(arrival: Arrival, address: bytes, sets: bytes) -> bool:
    """Return whether a datagram of that source has all of these sets, in this order."""
    at, found = 0, 0
    while at < len(sets):
        size = int.from_bytes(sets[at + 2 : at + 4])
        found = arrival.payload.find(sets[at : at + size], found) + size
        if pack_address(arrival.source) != address or found < size:
            return False
        at += size
    return True
