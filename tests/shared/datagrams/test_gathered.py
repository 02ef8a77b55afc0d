import gc
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.bus.messages import Datagrams, datagrams_topic, decode, encode
from shared.datagrams.batch import DatagramBatch, make_rows
from shared.datagrams.gathered import MAX_GATHERED, Gathered, portions
from shared.datagrams.limits import MAX_ROWS
from tests.builders import make_batch

V4, V6 = "192.0.2.1", "2001:db8::1"
datagrams = st.tuples(st.binary(max_size=40), st.sampled_from([V4, V6, "0.0.0.0", "::", "::ffff", "::1:ffff:0"]))
batches = st.lists(st.lists(datagrams, max_size=6), min_size=1, max_size=5).filter(any)


def gathered(found: list[list[tuple[bytes, str]]]) -> Gathered:
    """Batches of these payloads and sources."""
    return Gathered([make_batch([payload for payload, _ in each], [source for _, source in each]) for each in found])


@given(batches)
def test_the_rows_of_all_batches_follow_each_other(found: list[list[tuple[bytes, str]]]) -> None:
    """Rows, lengths and payloads are those of the batches, one after the other, also of empty ones."""
    whole = gathered(found)
    expected = [datagram for each in found for datagram in each]
    assert len(whole) == len(expected)
    assert whole.lengths.tolist() == [len(payload) for payload, _ in expected]
    assert whole.rows.tobytes() == b"".join(batch.rows.tobytes() for batch in whole.batches)
    assert list(whole.payloads(np.arange(len(whole)))) == [payload for payload, _ in expected]
    assert whole.payload_bytes == sum(len(payload) for payload, _ in expected)
    assert whole.stream == "messages"


@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from([None, 0, 1, 65_535])), min_size=1, max_size=4))
def test_each_row_keeps_its_generation(found: list[tuple[int, int | None]]) -> None:
    """Rows that the kernel has copied, by whatever generation, and others stay what they were when gathered."""
    batches = [
        replace(make_batch([b""] * count), generations=None if same is None else np.full(count, same, np.uint16))
        for count, same in found
    ]
    whole = Gathered(batches)
    if all(same is None for _, same in found):
        assert whole.generations is None
    else:
        assert whole.generations is not None
        assert whole.generations.tolist() == [same or 0 for count, same in found for _ in range(count)]


def strided(batch: DatagramBatch, stride: int) -> DatagramBatch:
    """The same batch with its payloads at multiples of a stride, 0: end to end."""
    if not stride:
        return batch
    payload = b"".join(each.ljust(stride, b"?") for _, _, each in batch.datagrams())
    return DatagramBatch(batch.stream, batch.received_ns, batch.rows, payload, stride)


@given(batches, st.lists(st.sampled_from([0, 40, 41, 100]), min_size=5, max_size=5), st.data())
def test_payloads_are_found_at_their_strides(
    found: list[list[tuple[bytes, str]]], strides: list[int], data: st.DataObject
) -> None:
    """Batches with a stride, each its own, or without one are gathered alike: any row's payload is found."""
    batches = gathered(found).batches
    whole = Gathered([strided(batch, stride) for batch, stride in zip(batches, strides, strict=False)])
    expected = [payload for each in found for payload, _ in each]
    rows = data.draw(st.lists(st.integers(0, len(expected) - 1)))
    assert list(whole.payloads(np.array(rows, np.intp))) == [expected[row] for row in rows]
    for batch in whole.batches:
        if batch.stride:
            assert (np.diff(Gathered([batch]).pointers) == batch.stride).all()
    assert whole.lengths.tolist() == [len(payload) for payload in expected]
    assert whole.payload_bytes == sum(len(batch.payload) for batch in whole.batches)


@given(batches)
def test_ipv4_sources_are_known_from_others(found: list[list[tuple[bytes, str]]]) -> None:
    """A source is IPv4 when its address is mapped into IPv6, whatever the rest of it looks like."""
    whole = gathered(found)
    expected = ["." in source for each in found for _, source in each]
    assert whole.ipv4.tolist() == expected
    assert whole.all_ipv4 == all(expected)


@given(batches, st.data())
def test_any_rows_can_be_chosen(found: list[list[tuple[bytes, str]]], data: st.DataObject) -> None:
    """Payloads of some rows come in the order asked for, across the borders of batches, and as often."""
    whole = gathered(found)
    expected = [payload for each in found for payload, _ in each]
    rows = data.draw(st.lists(st.integers(0, len(expected) - 1)))
    assert list(whole.payloads(np.array(rows, np.intp))) == [expected[row] for row in rows]


def test_one_batch_is_taken_as_it_is() -> None:
    """Nothing of a batch that waits alone is copied."""
    batch = make_batch([b"one", b"two"])
    assert Gathered([batch]).rows is batch.rows


def test_batches_from_the_bus_are_gathered_where_they_lie() -> None:
    """Read-only buffers of any alignment, as ZeroMQ hands them over, serve as well as the worker's own."""
    batches = []
    for shift in range(8):
        batch = make_batch([bytes([shift]) * 9, b"", b"end"], (V4, V6))
        parts = encode(
            datagrams_topic("messages"), Datagrams("messages", 0), sender="ingest.1", boot=1, sequence=0, total=0,
            batch=batch,
        )  # fmt: skip
        moved = [memoryview(bytes(shift) + bytes(part))[shift:] for part in parts[3:]]
        taken = decode([*parts[:3], *moved]).batch
        assert taken is not None
        batches.append(taken)
    whole = Gathered(batches)
    assert list(whole.payloads(np.arange(len(whole)))) == [
        payload for shift in range(8) for payload in (bytes([shift]) * 9, b"", b"end")
    ]
    assert whole.ipv4.tolist() == [True, False, True] * 8


def test_payloads_live_as_long_as_what_was_gathered() -> None:
    """Batches that nobody else keeps are kept, so that what the kernel is pointed at is still there."""
    whole = Gathered([make_batch([bytes([number]) * 5000] * 50) for number in range(20)])
    pointers = whole.pointers
    gc.collect()
    _ = [bytes(5000) for _ in range(2000)]
    for row in range(0, len(whole), 97):
        (payload,) = whole.payloads(np.array([row]))
        assert payload == bytes([row // 50]) * 5000
    assert len(np.unique(pointers)) == len(whole)


@pytest.mark.parametrize("rows", [1, MAX_ROWS])
def test_full_batches_of_the_longest_stream_name_hold(rows: int) -> None:
    """The largest batches, in the largest number that may wait, add up."""
    columns = make_rows(np.ones(rows), np.zeros((rows, 16), np.uint8), np.arange(rows))
    whole = Gathered([DatagramBatch("s" * 64, 0, columns, bytes(rows)) for _ in range(8)])
    assert len(whole) == 8 * rows == whole.payload_bytes
    assert whole.rows["port"].tolist() == list(range(rows)) * 8


@given(st.lists(st.integers(0, MAX_GATHERED + 1), max_size=30))
def test_portions_hold_everything_in_order_and_no_more_than_they_may(sizes: list[int]) -> None:
    """All items come, in order, in portions that are within the bound, or a single item; none could take the next."""
    found = list(portions(sizes, lambda size: size))
    assert [size for portion in found for size in portion] == sizes
    assert all(sum(portion) <= MAX_GATHERED or len(portion) == 1 for portion in found)
    assert all(sum(one) + other[0] > MAX_GATHERED for one, other in pairwise(found))
