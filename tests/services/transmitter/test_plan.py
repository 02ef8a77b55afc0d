import ctypes
import socket
import struct
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.transmitter.packets.addressing import Addressing, Identification
from services.transmitter.packets.headers import GSO_UDP_L4, LINK_SIZE, NEEDS_CSUM
from services.transmitter.plan import FramePlan
from shared.datagrams.batch import DatagramBatch, make_rows
from shared.datagrams.gathered import Gathered
from shared.datagrams.gso_runs import MAX_SEGMENTS
from shared.datagrams.limits import MAX_DATAGRAM
from shared.datagrams.mmsg import IOVEC
from shared.net.addresses import pack_address
from tests.capture import Datagram, Header, Packet, parse_ipv4, parse_ipv6, parse_udp, reassemble

PLAN = FramePlan()
"""One for all tests, as a transmitter has: what an earlier plan left in its memory must not show."""
ETHERNET = {4: bytes(range(12)) + b"\x08\x00", 6: bytes(range(12)) + b"\x86\xdd"}
SOURCES = {
    4: [("192.0.2.1", 514), ("192.0.2.1", 515), ("10.255.255.255", 65_535), ("0.0.0.1", 0), ("203.0.113.9", 2055)],
    6: [("2001:db8::1", 514), ("2001:db8::1", 515), ("fd00::ffff:ffff", 65_535), ("::2", 0), ("2001:db8::2", 514)],
}
sizes = st.sampled_from([0, 1, 99, 100, 100, 100, 1232, 1233, 1452, 1453, 1464, 1472, 1473, 4000, MAX_DATAGRAM])
runs = st.lists(st.tuples(st.integers(0, 4), sizes, st.integers(1, 5)), min_size=1, max_size=12)


class Planned(Protocol):
    """Messages for sendmmsg(2)."""

    messages: npt.NDArray[np.void]
    frames: int


@dataclass(frozen=True)
class Sent:
    """A datagram as the collector would have it, and the frame it came in."""

    datagram: Datagram
    frame: int


def target(version: int, *, link: bool = True, port: int = 2055) -> Addressing:
    """A collector's address and port."""
    family, address = (socket.AF_INET, "198.51.100.7") if version == 4 else (socket.AF_INET6, "2001:db8:7::7")
    return Addressing(version, socket.inet_pton(family, address), port, 61, 46, 3, ETHERNET[version] if link else b"")


def gathered(version: int, found: list[tuple[int, int, int]], cuts: int = 1) -> Gathered:
    """Datagrams of so many sources in runs of a size, in `cuts` batches; every payload differs where it can."""
    rows = [(SOURCES[version][source], size) for source, size, count in found for _ in range(count)]
    parts = [part for part in np.array_split(np.arange(len(rows)), cuts) if len(part)]
    return Gathered([batch_of([rows[number] for number in part], int(part[0])) for part in parts])


def batch_of(rows: list[tuple[tuple[str, int], int]], first: int) -> DatagramBatch:
    """A batch of these sources and sizes."""
    payloads = [((first + number) % 251 + 1).to_bytes(1) * size for number, (_, size) in enumerate(rows)]
    addresses = [pack_address(source) for (source, _), _ in rows]
    columns = make_rows([size for _, size in rows], addresses, [port for (_, port), _ in rows])
    return DatagramBatch("messages", 0, columns, b"".join(payloads))


def memory_of(plan: Planned) -> Iterator[bytes]:
    """Return the bytes that the kernel would read of each message."""
    for message in plan.messages[: plan.frames]:
        iovecs = np.frombuffer(ctypes.string_at(int(message["iov"]), int(message["iovlen"]) * IOVEC.itemsize), IOVEC)
        yield b"".join(ctypes.string_at(int(base), int(size)) if size else b"" for base, size in iovecs)


def sent(plan: Planned, version: int, *, link: bool) -> list[Sent]:
    """The datagrams of a plan as a receiver takes them apart, every length and checksum verified."""
    found: list[Sent] = []
    pending: dict[Header, list[Packet]] = {}
    for number, frame in enumerate(memory_of(plan)):
        partial, segment, packet = False, 0, frame
        if link:
            flags, kind, headers, segment, start, offset = struct.unpack_from("=BBHHHH", frame)
            partial = flags == NEEDS_CSUM
            assert kind == (GSO_UDP_L4 if segment else 0)
            assert (start, offset) == ((34, 6) if version == 4 else (54, 6))
            assert headers == (start + 8 if partial else 0) <= len(frame) - 10
            assert frame[10:24] == ETHERNET[version]
            packet = frame[LINK_SIZE:]
        whole = reassemble((parse_ipv4 if version == 4 else parse_ipv6)(packet), pending)
        if whole is None:
            assert not partial, "nobody completes the checksum of a fragment"
            continue
        datagram = parse_udp(*whole, ("", ""), partial)
        step = segment or max(1, len(datagram.payload))
        for at in range(0, max(1, len(datagram.payload)), step):
            payload = datagram.payload[at : at + step]
            found.append(Sent(Datagram(datagram.source, datagram.source_port, payload, *fields(datagram)), number))
    assert not pending
    return found


def fields(datagram: Datagram) -> tuple[int, Header, int, tuple[str, str], bool]:
    """Return the fields that all pieces of a cut datagram share."""
    return datagram.port, datagram.header, datagram.fragments, datagram.macs, datagram.partial


def by_source(rows: list[tuple[str, int, bytes]]) -> dict[tuple[str, int], list[bytes]]:
    """Payloads of each source, in order."""
    found: dict[tuple[str, int], list[bytes]] = defaultdict(list)
    for source, port, payload in rows:
        found[source, port].append(payload)
    return found


@settings(max_examples=100)
@given(
    st.sampled_from([4, 6]),
    runs,
    st.sampled_from([1280, 1500, 9000, 65_536]),
    st.booleans(),
    st.booleans(),
    st.integers(1, 3),
    st.data(),
)
def test_frames_hold_exactly_the_selected_rows(
    version: int,
    found: list[tuple[int, int, int]],
    mtu: int,
    link: bool,
    segmentation: bool,
    cuts: int,
    data: st.DataObject,
) -> None:
    """Taken apart by a receiver, frames are each source's datagrams in order, every header and checksum right."""
    batch = gathered(version, found, cuts)
    chosen = data.draw(st.none() | st.lists(st.booleans(), min_size=len(batch), max_size=len(batch)).filter(any))
    rows = None if chosen is None else np.flatnonzero(np.array(chosen, np.bool_))
    PLAN.build(batch, rows, version, mtu, link=link, segmentation=segmentation)
    everything = [datagram for each in batch.batches for datagram in each.datagrams()]
    wanted = by_source(everything if rows is None else [everything[row] for row in rows])
    numbers = Identification()
    for port in (2055, 9):  # a second collector gets the same plan
        PLAN.address([target(version, link=link, port=port)], [b"name"], [numbers])
        came = sent(PLAN, version, link=link)
        datagrams = [each.datagram for each in came]
        assert by_source([(each.source, each.source_port, each.payload) for each in datagrams]) == wanted
        assert {each.port for each in datagrams} == {port}
        assert {(each.header.hop_limit, each.header.traffic_class) for each in datagrams} == {(61, 46 << 2)}
        assert not any(each.header.dont_fragment for each in datagrams if version == 4)
    assert PLAN.rows == len(datagrams) == PLAN.rows_before[-1]
    assert PLAN.bytes_before[-1] == sum(len(each.payload) for each in datagrams)
    longest = max(mtu, 65_535 if segmentation and link else 0) + (LINK_SIZE if link else 0)
    assert max(map(len, memory_of(PLAN))) <= longest


@settings(max_examples=100)
@given(
    st.sampled_from([4, 6]),
    runs,
    st.booleans(),
    st.booleans(),
    st.lists(st.lists(st.integers(0, 60), min_size=1, unique=True), min_size=2, max_size=5),
)
def test_each_part_is_addressed_to_its_own_collector(
    version: int, found: list[tuple[int, int, int]], link: bool, segmentation: bool, chosen: list[list[int]]
) -> None:
    """In a plan of several parts each collector gets its rows, each source's in order, marked as it wants them."""
    batch = gathered(version, [(source, min(size, 1400), count) for source, size, count in found])
    everything = [datagram for each in batch.batches for datagram in each.datagrams()]
    parts = [sorted({row % len(batch) for row in rows}) for rows in chosen]
    firsts = [0, *accumulate(len(rows) for rows in parts[:-1])]
    rows = np.array([row for part in parts for row in part])
    PLAN.build(batch, rows, version, 1500, link=link, segmentation=segmentation, parts=firsts)
    addressings = [
        replace(target(version, link=link, port=9 + part), hop_limit=1 + part, dscp=part) for part in range(len(parts))
    ]
    names = [b"to%d" % part for part in range(len(parts))]
    PLAN.address(addressings, names, [Identification() for _ in parts])
    came = [each.datagram for each in sent(PLAN, version, link=link)]
    for part, wanted in enumerate(parts):
        mine = [each for each in came if each.port == 9 + part]
        assert by_source([(each.source, each.source_port, each.payload) for each in mine]) == by_source(
            [everything[row] for row in wanted]
        )
        assert {(each.header.hop_limit, each.header.traffic_class) for each in mine} == {(1 + part, part << 2)}
        first, stop = PLAN.first_units[part], PLAN.first_units[part + 1]
        assert {PLAN.part_of(unit) for unit in range(first, stop)} == {part}
        assert {
            ctypes.string_at(int(message["name"]), int(message["namelen"])) for message in PLAN.messages[first:stop]
        } == {names[part]}
        rest = PLAN.rest(int(PLAN.rows_before[first]) + 1, part)
        assert sorted([*rest.tolist(), *set(wanted) - set(rest.tolist())]) == wanted
        assert len(rest) == len(wanted) - 1
    assert len(came) == PLAN.rows == len(rows)


def test_collectors_at_one_address_share_identifications() -> None:
    """Parts whose collectors have one address never carry the same identification."""
    batch, numbers = gathered(4, [(0, 100, 50)]), Identification()
    rows = np.tile(np.arange(50), 3)
    PLAN.build(batch, rows, 4, 1500, link=True, segmentation=False, parts=[0, 50, 100])
    PLAN.address([target(4, port=port) for port in (1, 2, 3)], [b"name"] * 3, [numbers] * 3)
    assert len({each.datagram.header.identification for each in sent(PLAN, 4, link=True)}) == 150


@given(st.sampled_from([4, 6]), runs, st.sampled_from([1280, 1500]))
def test_units_are_runs_of_one_source_or_one_datagram_in_fragments(
    version: int, found: list[tuple[int, int, int]], mtu: int
) -> None:
    """Units cover all frames and rows in order, and none has more segments than a kernel takes."""
    PLAN.build(gathered(version, found), None, version, mtu, link=True, segmentation=True)
    frames = [PLAN.first_frame(unit) for unit in range(PLAN.units + 1)]
    assert (frames[0], frames[-1]) == (0, PLAN.frames)
    for unit in range(PLAN.units):
        assert {PLAN.unit_of(frame) for frame in range(frames[unit], frames[unit + 1])} == {unit}
        rows = PLAN.rows_before[unit + 1] - PLAN.rows_before[unit]
        assert 1 <= rows <= MAX_SEGMENTS
        assert PLAN.segmented(unit) == (rows > 1)
        assert rows == 1 or frames[unit + 1] == frames[unit] + 1


def test_interleaved_sources_are_brought_together() -> None:
    """Datagrams of two sources that take turns leave as one frame each."""
    PLAN.build(gathered(4, [(0, 100, 1), (1, 100, 1)] * 20), None, 4, 1500, link=True, segmentation=True)
    assert PLAN.frames == 2
    PLAN.address([target(4)], [b"name"], [Identification()])
    assert len(sent(PLAN, 4, link=True)) == 40


def test_rows_left_can_be_planned_again() -> None:
    """The rows left after some were handled are the others, in the plan's order."""
    batch = gathered(4, [(0, 100, 1), (1, 100, 1)] * 4)
    PLAN.build(batch, None, 4, 1500, link=True, segmentation=True)
    PLAN.address([target(4)], [b"name"], [Identification()])
    order = [(each.datagram.source_port, each.datagram.payload) for each in sent(PLAN, 4, link=True)]
    PLAN.build(batch, PLAN.rest(4), 4, 1500, link=True, segmentation=False)
    PLAN.address([target(4)], [b"name"], [Identification()])
    assert [(each.datagram.source_port, each.datagram.payload) for each in sent(PLAN, 4, link=True)] == order[4:]


@pytest.mark.parametrize("version", [4, 6])
def test_fragmented_datagrams_of_an_address_never_share_an_identification(version: int) -> None:
    """Of a thousand fragmented datagrams of one address, whatever its ports, no two carry the same identification."""
    numbers = Identification()
    seen: list[int | None] = []
    for _ in range(10):
        PLAN.build(gathered(version, [(0, 2000, 50), (1, 2000, 50)]), None, version, 1500, link=True, segmentation=True)
        PLAN.address([target(version)], [b"name"], [numbers])
        seen += [each.datagram.header.identification for each in sent(PLAN, version, link=True)]
    assert len(set(seen)) == 1000


def test_an_identification_comes_again_after_all_others_and_is_never_0() -> None:
    """Raw IP would give each fragment that is numbered 0 another number; all others are used in turn."""
    numbers = Identification()
    of_one_source = np.zeros(0xFFFF, np.uint64)
    first, second = (numbers.draw_for_fragments(of_one_source) for _ in range(2))
    assert sorted(first) == list(range(1, 0x10000))
    assert (first == second).all()


def test_runs_leave_identifications_for_their_segments() -> None:
    """The kernel counts up from a run's identification for each segment, so the next frame begins behind them."""
    PLAN.build(gathered(4, [(0, 100, 10), (1, 100, 1), (2, 100, 3)]), None, 4, 1500, link=True, segmentation=True)
    PLAN.address([target(4)], [b"name"], [Identification()])
    first, *others = (parse_ipv4(frame[LINK_SIZE:]).header.identification or 0 for frame in memory_of(PLAN))
    assert [(number - first) % 65_536 for number in others] == [10, 11]


def test_flow_labels_tell_flows_apart() -> None:
    """Over IPv6 a source has one flow label towards a collector, never 0, and another source has another."""
    PLAN.build(gathered(6, [(0, 100, 3), (1, 100, 3), (4, 100, 3)]), None, 6, 1500, link=True, segmentation=True)
    PLAN.address([target(6)], [b"name"], [Identification()])
    labels = {
        (each.datagram.source, each.datagram.source_port): each.datagram.header.flow_label
        for each in sent(PLAN, 6, link=True)
    }
    assert len(set(labels.values())) == 3
    assert all(labels.values())


@pytest.mark.parametrize("link", [True, False])
def test_checksum_that_comes_out_as_zero_is_sent_as_all_ones(link: bool) -> None:
    """A UDP checksum of 0 would mean that there is none: it is sent as 0xffff (RFC 768), fragmented or not."""
    size = 2000 if link else 4
    source, collector = pack_address("192.0.2.1")[12:], target(4).address
    fixed = sum(struct.unpack(">4H", source + collector)) + 17 + 2 * (size + 8) + 514 + 2055
    payload = (0xFFFF - fixed % 0xFFFF).to_bytes(2) + bytes(size - 2)
    batch = DatagramBatch("messages", 0, make_rows([size], [pack_address("192.0.2.1")], [514]), payload)
    PLAN.build(Gathered([batch]), None, 4, 1500, link=link, segmentation=True)
    PLAN.address([target(4, link=link)], [b"name"], [Identification()])
    (only,) = sent(PLAN, 4, link=link)
    assert only.datagram.payload == payload
    at = (LINK_SIZE if link else 0) + 26
    assert next(memory_of(PLAN))[at : at + 2] == b"\xff\xff"
