import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.ingest.flows import template_cache
from services.ingest.flows.exporters import ExporterTracker
from services.ingest.flows.sets import read_templates
from services.ingest.flows.template_cache import MAX_DOMAIN_BYTES, DefiningDatagram, Definitions
from services.ingest.flows.template_reader import DATAGRAM_COST, MAX_READ
from shared.net.addresses import unpack_address
from shared.settings.entries import Protocol
from tests.services.ingest.flows import exported
from tests.services.ingest.flows.test_sequence_gaps import Sent, batch_of

SOURCE = "192.0.2.1"
PROTOCOLS: dict[int, Protocol] = {9: "netflow", 10: "ipfix"}
HEADERS = {9: 20, 10: 16}
FLOWS = (256, 257)
OPTIONS = (300, 301)


class Kept(NamedTuple):
    """A kept datagram as a collector reads it: its header's facts and its sets, by what they are."""

    version: int
    records: int
    number: int
    domain: int
    sets: list[tuple[int, bytes]]


def read(payload: bytes) -> Kept:
    """Read a datagram by the documents."""
    version, count = struct.unpack_from(">HH", payload)
    number, domain = struct.unpack_from(">II", payload, 12 if version == 9 else 8)
    at, sets = HEADERS[version], []
    while at < len(payload):
        kind, size = struct.unpack_from(">HH", payload, at)
        assert 4 < size <= len(payload) - at
        sets.append((kind, payload[at + 4 : at + size]))
        at += size
    assert version == 9 or count == len(payload)
    return Kept(version, count, number, domain, sets)


def datagram(version: int, number: int, *sets: bytes, count: int = 1, uptime: int = 1000, domain: int = 0) -> bytes:
    """A datagram of a version with these sets."""
    if version == 10:
        return exported.ipfix(number, *sets, domain=domain)
    return struct.pack(">HHIIII", 9, count, uptime, 0, number, domain) + b"".join(sets)


def a_template(version: int, id: int, lengths: Sequence[int]) -> bytes:
    """A set with one template of flows."""
    return exported.a_set(0 if version == 9 else 2, exported.template(id, lengths))


def an_options_template(version: int, id: int, lengths: Sequence[int]) -> bytes:
    """A set with one options template, whose first field is the scope."""
    if version == 10:
        return exported.a_set(3, exported.options_template(id, lengths))
    fields = b"".join(struct.pack(">HH", at, length) for at, length in enumerate(lengths))
    return exported.a_set(1, struct.pack(">HHH", id, 4, 4 * len(lengths) - 4) + fields)


def keep(
    version: int, sent: Sequence[Sent], cuts: Sequence[int] = (), stride: int = 0, now_ns: int = 0
) -> list[tuple[int, Kept]]:
    """Return what is kept when these come in batches that begin at `cuts`: port, and what a collector reads."""
    exporters = ExporterTracker(PROTOCOLS[version], Counter())
    edges = [0, *sorted({cut % (len(sent) + 1) for cut in cuts}), len(sent)]
    for start, stop in pairwise(edges):
        if start < stop:
            exporters.observe(batch_of(sent[start:stop], stride))
    return [(ready.port, read(ready.payload)) for ready in exporters.kept_templates(now_ns)]


class Event(NamedTuple):
    """Something that an exporter sends: an action, a template's id, its lengths, a scope's value, and what goes along.

    `with_flows` are set in one datagram with flows.
    """

    action: str
    id: int
    lengths: tuple[int, ...]
    scope: int
    with_flows: bool


def events(draw_variable: bool) -> st.SearchStrategy[list[Event]]:
    """Series of templates, options templates, options data and flows."""
    length = st.sampled_from([1, 2, 4, 65535] if draw_variable else [1, 2, 4])
    return st.lists(
        st.builds(
            Event,
            st.sampled_from(["template", "options", "data", "data", "flows"]),
            st.sampled_from(FLOWS),
            st.lists(length, min_size=2, max_size=4).map(tuple),
            st.integers(0, 3),
            st.booleans(),
        ),
        max_size=24,
    )


def encode_record(lengths: Sequence[int], scope: int, filling: int) -> bytes:
    """A record whose scope field has this value; one of variable length has it in one byte."""
    fields = []
    for at, length in enumerate(lengths):
        value = scope if at == 0 else filling % 256
        fields.append(b"\x01" + bytes([value]) if length == 65535 else bytes([value]) * length)
    return b"".join(fields)


class Model:
    """An exporter, and what a collector that has had all of its datagrams knows of it."""

    def __init__(self, version: int) -> None:
        self.version = version
        self.templates: dict[int, bytes] = {}
        self.options: dict[tuple[int, int], bytes] = {}
        self.lengths: dict[int, tuple[int, ...]] = {}
        self.sent: list[bytes] = []
        self.number = 0

    def send(self, event: Event, filling: int) -> None:
        """Send a datagram."""
        options_id = OPTIONS[event.id - FLOWS[0]]
        sets, records = [], 0
        if event.action == "template":
            sets.append(a_template(self.version, event.id, event.lengths))
            self.templates[event.id] = sets[0]
        elif event.action == "options":
            sets.append(an_options_template(self.version, options_id, event.lengths))
            if self.templates.get(options_id) != sets[0]:
                self.options = {key: record for key, record in self.options.items() if key[0] != options_id}
            self.templates[options_id], self.lengths[options_id] = sets[0], event.lengths
        elif event.action == "data" and options_id in self.lengths:
            record = encode_record(self.lengths[options_id], event.scope, filling)
            sets.append(exported.a_set(options_id, record))
            self.options[options_id, event.scope] = record
            records = 1
        if event.with_flows or not sets:
            sets.append(exported.a_set(999, bytes(8)))
        self.sent.append(datagram(self.version, self.number, *sets, count=len(sets)))
        self.number += records if self.version == 10 else 1


def known_of(version: int, kept: Sequence[Kept]) -> tuple[dict[int, bytes], dict[tuple[int, int], bytes]]:
    """Return templates and options data that a collector knows from these datagrams, in their order."""
    templates: dict[int, bytes] = {}
    options: dict[tuple[int, int], bytes] = {}
    lengths: dict[int, tuple[int, ...]] = {}
    for each in kept:
        for kind, content in each.sets:
            if kind < 256:
                (found,) = read_templates(content, options=kind in (1, 3), version=version)
                if templates.get(found.id) != exported.a_set(kind, content) and found.options:
                    options = {key: record for key, record in options.items() if key[0] != found.id}
                templates[found.id], lengths[found.id] = exported.a_set(kind, content), found.lengths
            else:
                assert kind in lengths, "options data before their template, or flows"
                options[kind, content[1 if lengths[kind][0] == 65535 else 0]] = content
    return templates, options


@pytest.mark.parametrize("version", [9, 10])
@given(data=st.data(), cuts=st.lists(st.integers(0, 30), max_size=6), stride=st.sampled_from([0, 256]))
@settings(max_examples=60, deadline=None)
def test_what_is_kept_tells_all_that_was_told(version: int, data: st.DataObject, cuts: list[int], stride: int) -> None:
    """Kept datagrams tell a new collector what one knows that has had all; and no flows; numbers end where due."""
    model = Model(version)
    for filling, event in enumerate(data.draw(events(version == 10))):
        model.send(event, filling)
    kept = [each for _, each in keep(version, [(SOURCE, payload) for payload in model.sent], cuts, stride)]
    templates, options = known_of(version, kept)
    assert templates == model.templates
    assert options == model.options
    takes = [1 if version == 9 else sum(kind >= 256 for kind, _ in each.sets) for each in kept]
    ends = [(each.number + taken) % 2**32 for each, taken in zip(kept, takes, strict=True)]
    assert [each.number for each in kept[1:]] == ends[:-1]
    if kept and version == 9:
        assert ends[-1] == model.number


def one(version: int, *payloads: bytes, now_ns: int = 0) -> list[Kept]:
    """Return what is kept of one exporter's datagrams."""
    return [each for _, each in keep(version, [(SOURCE, payload) for payload in payloads], now_ns=now_ns)]


def test_a_datagram_without_flows_is_kept_as_it_came() -> None:
    """Of NetFlow v9 even the padding, the count of records and the order of sets stay; number and clocks go on."""
    sets = [
        exported.a_set(0, exported.template(256, [4, 4]) + exported.template(257, [8])),
        an_options_template(9, 300, [4, 1]) + b"",
        exported.a_set(300, bytes([0, 0, 0, 7, 9]) + bytes(3)),
    ]
    sent = datagram(9, 70, *sets, count=4, uptime=5000, domain=3)
    exporters = ExporterTracker("netflow", Counter())
    exporters.observe(batch_of([(SOURCE, sent)]))
    exporters.observe(batch_of([(SOURCE, datagram(9, 71, exported.a_set(256, bytes(8)), uptime=6000, domain=3))]))
    (ready,) = exporters.kept_templates(2_500_000_000)
    assert ready.payload[20:] == sent[20:]
    assert struct.unpack(">HHIIII", ready.payload[:20]) == (9, 4, 7500, 2, 71, 3)


@pytest.mark.parametrize("version", [9, 10])
def test_of_a_datagram_with_flows_its_templates_are_kept(version: int) -> None:
    """Sets of templates and options data are cut out of a datagram with flows; its header counts them alone."""
    flows, told = exported.a_set(256, bytes(8)), an_options_template(version, 300, [4, 1])
    data = exported.a_set(300, bytes([0, 0, 0, 7, 9]) + bytes([0, 0, 0, 8, 1]) + bytes(2))
    sent = datagram(version, 5, a_template(version, 256, [4, 4]), flows, told, flows, data, count=6)
    (kept,) = one(version, sent)
    assert [kind for kind, _ in kept.sets] == ([0, 1, 300] if version == 9 else [2, 3, 300])
    assert kept.sets[2][1] == data[4:]
    assert version == 10 or kept.records == 4


@pytest.mark.parametrize("version", [9, 10])
def test_an_exporter_that_restarts_is_forgotten(version: int) -> None:
    """Templates of before a restart are dropped, with it in the same receive call or in the next; later ones kept."""
    old, new = a_template(version, 256, [4]), a_template(version, 257, [2])
    before = datagram(version, 90_000, old, uptime=500_000)
    after = datagram(version, 3, new, uptime=100)
    for cuts in ([], [1]):
        kept = keep(version, [(SOURCE, before), (SOURCE, after)], cuts)
        assert [each.sets for _, each in kept] == [[(new[1], new[4:])]]


@pytest.mark.parametrize("version", [9, 10])
def test_address_port_and_domain_tell_exporters_apart(version: int) -> None:
    """The same template id means another thing for another address, port or domain."""
    sent: list[Sent] = [
        (address, datagram(version, 1000 * number, a_template(version, 256, [number + 1]), domain=domain), port)
        for number, (address, port, domain) in enumerate(
            [(SOURCE, 1, 0), ("192.0.2.2", 1, 0), ("2001:db8::1", 1, 0), (SOURCE, 2, 0), (SOURCE, 1, 7)]
        )
    ]
    kept = keep(version, sent)
    assert sorted((port, each.domain, each.sets[0][1][-1]) for port, each in kept) == [
        (1, 0, 1), (1, 0, 2), (1, 0, 3), (1, 7, 5), (2, 0, 4)
    ]  # fmt: skip


def test_what_was_not_told_again_for_an_hour_is_dropped() -> None:
    """A template that its exporter has not repeated is too old for a collector that joins."""
    sent = datagram(9, 1, a_template(9, 256, [4]))
    assert one(9, sent, now_ns=3600 * 10**9)
    assert not one(9, sent, now_ns=3601 * 10**9)


@pytest.mark.parametrize("version", [9, 10])
def test_memory_is_bounded(version: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exporter that defines ever more, and more exporters than there is room for, lose the oldest."""
    room = template_cache.MAX_BYTES // 8
    monkeypatch.setattr(template_cache, "MAX_BYTES", room)
    exporters = ExporterTracker(PROTOCOLS[version], Counter())
    cache = exporters.templates.cache
    options = an_options_template(version, 300, [2, 400])
    exporters.observe(batch_of([(SOURCE, datagram(version, 0, options))]))
    for number in range(400):
        record = exported.a_set(300, number.to_bytes(2) + bytes(400))
        sent = batch_of([(SOURCE, datagram(version, 1 + number, record))])
        exporters.observe(replace(sent, received_ns=number * 10**7))
    assert cache.size <= MAX_DOMAIN_BYTES
    last = read(exporters.kept_templates(0)[-1].payload)
    assert last.sets[0][1][:2] == (399).to_bytes(2)
    ids = range(256, 256 + 200)
    sets = exported.a_set(0 if version == 9 else 2, b"".join(exported.template(id, [4] * 14) for id in ids))
    for number in range(80):
        sent = batch_of([(f"10.0.{number // 250}.{number % 250}", datagram(version, 1, sets))])
        exporters.observe(replace(sent, received_ns=number * 10**8))
        assert cache.size <= room
    kept = exporters.kept_templates(0)
    assert cache.size == sum(domain.size for domain in cache._domains.values()) > room // 2
    assert len(kept) < 80


def test_a_flood_of_new_templates_costs_no_more_than_its_budget() -> None:
    """Only so much is read in a time; an exporter of which some is unread is forgotten, not half known."""
    exporters = ExporterTracker("netflow", Counter())
    template = exported.a_set(0, exported.template(256, [4] * 3000))
    exporters.observe(batch_of([(SOURCE, datagram(9, 1, template))]))
    flood = [(f"10.0.0.{n}", datagram(9, 1, exported.a_set(0, exported.template(256, [n] * 3000)))) for n in range(99)]
    changed = datagram(9, 2, exported.a_set(0, exported.template(256, [5] * 3000)))
    exporters.observe(batch_of([*flood, (SOURCE, changed)]))
    kept = exporters.kept_templates(0)
    assert 20 < len(kept) < 60
    assert SOURCE not in {unpack_address(ready.address) for ready in kept}
    later = replace(batch_of([(SOURCE, changed)]), received_ns=10**9)
    exporters.observe(later)
    assert SOURCE in {unpack_address(ready.address) for ready in exporters.kept_templates(0)}


def test_short_new_templates_cost_their_budget_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short datagrams are read no more than long ones would be; of strangers the rest is not even picked."""
    picked: list[bytes] = []
    recognize = template_cache.TemplateCache.recognize

    def noted(cache: template_cache.TemplateCache, slot: int, arrived: DefiningDatagram) -> Definitions | None:
        picked.append(arrived.address)
        return recognize(cache, slot, arrived)

    monkeypatch.setattr(template_cache.TemplateCache, "recognize", noted)
    exporters = ExporterTracker("netflow", Counter())
    template = exported.a_set(0, exported.template(256, [4]))
    exporters.observe(batch_of([(SOURCE, datagram(9, 1, template))]))
    for net in range(2):
        exporters.observe(
            batch_of([(f"10.0.{net}.{n}", datagram(9, 1, template, domain=d)) for n in range(250) for d in (1, 2)])
        )
    exporters.observe(batch_of([(f"10.1.0.{n}", datagram(9, 1, template)) for n in range(250)]))
    known = len(exporters.kept_templates(0))
    assert MAX_READ // (2 * DATAGRAM_COST) < known < MAX_READ // DATAGRAM_COST
    picked.clear()
    exporters.observe(batch_of([("10.1.0.1", datagram(9, 2, template)), (SOURCE, datagram(9, 2, template))]))
    assert list(map(unpack_address, picked)) == [SOURCE]
    assert len(exporters.kept_templates(0)) == known
    again = batch_of([("10.1.0.1", datagram(9, 3, template))])
    exporters.observe(replace(again, received_ns=10**9))
    (*_, last) = exporters.kept_templates(10**9)
    assert (unpack_address(last.address), last.since_ns) == ("10.1.0.1", 10**9)


def test_ipfix_counts_on_where_its_exporter_will() -> None:
    """Kept datagrams of IPFIX end at the number that comes next: that of the last datagram, and its records."""
    sets = a_template(10, 256, [4]), an_options_template(10, 300, [1, 1]), exported.a_set(300, bytes(4))
    payloads = [datagram(10, 40, *sets)]
    payloads += [datagram(10, number, exported.a_set(256, bytes(12))) for number in (42, 45, 48)]
    (kept,) = one(10, *payloads)
    assert kept.number == 51 - 2
    assert kept.sets[2] == (300, bytes(4))


def test_renewals_bear_their_own_numbers_and_those_of_who_gets_nothing_else() -> None:
    """While asked for, each datagram that defines something is a renewal; numbered `aside` they have no gap."""
    exporters = ExporterTracker("netflow", Counter())
    reader = exporters.templates
    reader.renewing = True
    template = a_template(9, 256, [4, 4])
    for number in (7, 8, 9, 27, 28):
        sets = [template] if number % 20 == 7 else [exported.a_set(256, bytes(8))]
        exporters.observe(batch_of([(SOURCE, datagram(9, number, *sets))]))
    assert [(read(each.payload).number, each.aside) for each in reader.renewals] == [(7, 7), (27, 8)]
    (kept,) = exporters.kept_templates(0)
    assert (read(kept.payload).number, kept.aside) == (28, 8)


def numbered_records(start: int, count: int) -> bytes:
    """Records of three bytes, each about something else: a scope of two bytes, and a value."""
    return b"".join(struct.pack(">HB", number, 0) for number in range(start, start + count))


@pytest.mark.parametrize("version", [9, 10])
def test_who_tells_more_than_is_kept_of_an_exporter_is_forgotten(version: int) -> None:
    """Options data about more than a domain has room for are not kept, nor sent as a renewal; the next datagram is."""
    exporters = ExporterTracker(PROTOCOLS[version], Counter())
    exporters.templates.renewing = True
    template = an_options_template(version, 256, [2, 1])
    data = [exported.a_set(256, numbered_records(start, 350)) for start in (0, 350)]
    exporters.observe(batch_of([(SOURCE, datagram(version, 1, template, *data))]))
    assert (exporters.kept_templates(0), exporters.templates.renewals) == ([], [])
    exporters.observe(batch_of([(SOURCE, datagram(version, 2, template))]))
    assert len(exporters.kept_templates(0)) == len(exporters.templates.renewals) == 1


lengths = st.lists(st.sampled_from([0, 1, 2, 2, 4, 65535]), max_size=4)
ids = st.sampled_from([0, 255, 256, 257])


def defining_sets(version: int) -> st.SearchStrategy[bytes]:
    """Sets that define templates, hold options data about a few things or about many, or are broken."""
    return st.one_of(
        st.builds(a_template, st.just(version), ids, lengths),
        st.builds(an_options_template, st.just(version), ids, lengths.filter(bool)),
        st.just(an_options_template(version, 256, [2, 1])),
        st.builds(
            exported.a_set,
            st.just(256),
            st.builds(numbered_records, st.sampled_from([0, 1, 300]), st.sampled_from([1, 3, 350, 512])),
        ),
        st.builds(exported.a_set, ids, st.binary(max_size=24)),
        st.binary(max_size=9),
    )


@pytest.mark.parametrize("version", [9, 10])
@given(
    data=st.data(),
    numbers=st.lists(st.sampled_from([0, 1, 2, 3, 4, 2**32 - 1]), min_size=1, max_size=16),
    cuts=st.lists(st.integers(0, 16), max_size=6),
    hours=st.lists(st.sampled_from([0, 0, 2]), min_size=7, max_size=7),
)
@settings(max_examples=60, deadline=None)
def test_whatever_is_defined_is_bounded_and_can_be_sent(
    version: int, data: st.DataObject, numbers: list[int], cuts: list[int], hours: list[int]
) -> None:
    """Strangers define anything, at any time: what is kept and renewed can be read, and its size is what is counted."""
    sets = st.lists(defining_sets(version), max_size=4)
    sent: list[Sent] = [
        (SOURCE, datagram(version, number, *data.draw(sets), uptime=1000 * (number % 3)), 2055 + number % 2)
        for number in numbers
    ]
    exporters = ExporterTracker(PROTOCOLS[version], Counter(), 16)
    exporters.templates.renewing = True
    cache, now_ns = exporters.templates.cache, 0
    edges = [0, *sorted({cut % (len(sent) + 1) for cut in cuts}), len(sent)]
    for (start, stop), passed in zip(pairwise(edges), hours, strict=False):
        now_ns += passed * 3600 * 10**9
        if start < stop:
            exporters.observe(replace(batch_of(sent[start:stop]), received_ns=now_ns))
        assert all(domain.size <= MAX_DOMAIN_BYTES for domain in cache._domains.values())
        for ready in (*exporters.templates.renewals, *exporters.kept_templates(now_ns)):
            assert read(ready.payload).sets
        assert cache.size == sum(domain.size for domain in cache._domains.values())
