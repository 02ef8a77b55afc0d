import random
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.forwarder.order import _SPREAD, by_length
from services.forwarder.plan import SendPlan
from shared.datagrams.batch import DatagramBatch, Indices, make_rows
from shared.datagrams.gathered import MAX_GATHERED, Gathered
from shared.datagrams.limits import MAX_DATAGRAM, MAX_ROWS
from shared.net.addresses import pack_address

lengths_of_rows = st.sampled_from([0, 1, 100, 1464, MAX_DATAGRAM]) | st.integers(0, MAX_DATAGRAM)


def colliding(count: int) -> list[bytes]:
    """Addresses that `by_length` takes for one exporter, found by trying."""
    draw = np.random.default_rng(7).integers(0, 1 << 32, (800_000, 5), dtype=np.uint32)
    hashes = (draw * _SPREAD).sum(axis=1, dtype=np.uint32) >> np.uint32(16)
    return [row[1:].tobytes() for row in draw[hashes == hashes[0]][:count]]


COLLIDING = colliding(6)
addresses = st.one_of(
    st.integers(0, 3).map(lambda number: pack_address(f"192.0.2.{number}")),
    st.integers(0, 3).map(lambda number: pack_address(f"2001:db8::{number:x}")),
    st.ip_addresses().map(lambda address: pack_address(str(address))),
    st.sampled_from(COLLIDING),
    st.binary(min_size=16, max_size=16),
)


def gathered(rows: list[tuple[int, bytes]]) -> Gathered:
    """Rows of these lengths and packed addresses, without payloads."""
    columns = make_rows([length for length, _ in rows], [address for _, address in rows], range(len(rows)))
    batches = [columns[start : start + MAX_ROWS] for start in range(0, len(rows), MAX_ROWS)]
    return Gathered([DatagramBatch("messages", 0, each, b"") for each in batches])


def by_exporter(rows: list[tuple[int, bytes]], order: list[int]) -> dict[bytes, list[int]]:
    """The rows of each exporter, in the order they are to leave."""
    found = defaultdict(list)
    for row in order:
        found[rows[row][1]].append(row)
    return found


def ordered(rows: list[tuple[int, bytes]]) -> list[int]:
    """The order that they get, which must be one that no exporter notices."""
    whole = gathered(rows)
    order: Indices = by_length(whole.words, whole.lengths)
    found: list[int] = order.tolist()
    assert sorted(found) == list(range(len(rows)))
    assert by_exporter(rows, found) == by_exporter(rows, list(range(len(rows))))
    return found


@settings(max_examples=150)
@given(st.lists(st.tuples(lengths_of_rows, addresses), min_size=1, max_size=200))
def test_no_exporters_order_changes(rows: list[tuple[int, bytes]]) -> None:
    """Every row is there once, and those of each exporter stand in the order they came, whatever their addresses."""
    ordered(rows)


@settings(max_examples=40)
@given(st.integers(1, 700), st.integers(0, 1 << 32), st.sampled_from([1, 2, MAX_ROWS, MAX_ROWS + 1, MAX_GATHERED]))
def test_no_exporters_order_changes_in_full_batches(exporters: int, seed: int, count: int) -> None:
    """The same holds for as many rows as may be gathered, from one exporter to hundreds."""
    draw = random.Random(seed)
    sources = [draw.randbytes(16) for _ in range(exporters)] + COLLIDING
    ordered([(draw.choice([draw.randrange(MAX_DATAGRAM), 1464]), draw.choice(sources)) for _ in range(count)])


def test_ports_of_an_address_are_one_exporter() -> None:
    """Rows of one address keep their order whatever the ports and lengths: `port` does not tell exporters apart."""
    rows = [(length, pack_address("192.0.2.1")) for length in random.Random(3).choices(range(2000), k=300)]
    assert ordered(rows) == list(range(300))


def test_addresses_with_one_hash_only_make_waves_smaller() -> None:
    """Exporters that can't be told apart by their hash keep the order among them too."""
    assert len(set(COLLIDING)) == 6
    rows = [(length, COLLIDING[length % 6]) for length in random.Random(4).choices(range(2000), k=300)]
    assert ordered(rows) == list(range(300))


def test_a_wave_ends_for_an_exporter_where_its_rows_grow() -> None:
    """Rows stand longest first in each wave, and an exporter's next wave begins with a row that is longer."""
    draw = random.Random(5)
    rows = [(draw.randrange(300), pack_address(f"10.1.0.{number % 20}")) for number in range(200)]
    last, wave, waves = dict[bytes, int](), Counter[bytes](), []
    for length, source in rows:
        wave[source] += length > last.get(source, MAX_DATAGRAM)
        last[source] = length
        waves.append(wave[source])
    assert ordered(rows) == sorted(range(200), key=lambda row: (waves[row], -rows[row][0]))


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("exporters", [500, 1000])
def test_rows_leave_together(version: int, exporters: int) -> None:
    """Of hundreds of exporters with syslog's lengths, less than half as many sends leave as there were."""
    draw = random.Random(6)
    form = "10.0.{}.{}" if version == 4 else "2001:db8::{:x}:{:x}"
    rows = [
        (draw.randrange(60, 300), pack_address(form.format(*divmod(draw.randrange(exporters), 256))))
        for _ in range(1000)
    ]
    columns = make_rows([length for length, _ in rows], [address for _, address in rows], 514)
    batch = Gathered([DatagramBatch("messages", 0, columns, bytes(sum(length for length, _ in rows)))])
    plan = SendPlan()
    plan.build(batch, None, 1472)
    assert plan.rows == 1000
    assert plan.sends * 2 < 1000
    assert by_exporter(rows, plan.rest(0).tolist()) == by_exporter(rows, list(range(1000)))
