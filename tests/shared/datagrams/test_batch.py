from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.bus.loans.lender import CHUNK
from shared.datagrams.batch import ROW, DatagramBatch, make_rows
from shared.datagrams.limits import MAX_DATAGRAM, MAX_PAYLOAD, MAX_ROWS
from tests.builders import make_batch

ADDRESS = bytes(16)


def batch_of(lengths: list[int], size: int, stride: int = 0) -> DatagramBatch:
    """Zeros, in a batch whose rows say these lengths."""
    rows = make_rows(lengths, [ADDRESS] * len(lengths), 514) if lengths else np.empty(0, ROW)
    return DatagramBatch("messages", 0, rows, bytes(size), stride)


@given(
    st.lists(st.tuples(st.ip_addresses(v=4) | st.ip_addresses(v=6), st.integers(0, 65535), st.binary(max_size=40))),
    st.booleans(),
)
def test_datagrams_come_out_as_they_went_in(datagrams: list[tuple[object, int, bytes]], view: bool) -> None:
    """Addresses of both families, ports and payloads, empty ones too, come out of the columns as they went in."""
    batch = make_batch([payload for _, _, payload in datagrams], [str(source) for source, _, _ in datagrams] or ["::"])
    batch.rows["port"] = [port for _, port, _ in datagrams]
    payload = memoryview(bytearray(batch.payload)) if view else batch.payload
    read = DatagramBatch(batch.stream, batch.received_ns, batch.rows, payload)
    read.check()
    assert len(read) == len(datagrams)
    expected = [(str(getattr(source, "ipv4_mapped", None) or source), *rest) for source, *rest in datagrams]
    assert list(read.datagrams()) == expected


def test_offsets_are_where_payloads_begin() -> None:
    """Offsets begin at zero and end where the payload ends, whatever the sum of the lengths."""
    batch = batch_of([MAX_DATAGRAM] * 5 + [0, 1], 5 * MAX_DATAGRAM + 1)
    batch.check()
    assert batch.offsets.tolist() == [*range(0, 5 * MAX_DATAGRAM + 1, MAX_DATAGRAM), *[5 * MAX_DATAGRAM] * 1, 327536]
    assert int(batch.lengths.sum()) == 327536


@pytest.mark.parametrize(
    ("lengths", "size", "reason"),
    [
        ([0] * (MAX_ROWS + 1), 0, "1025 rows, more than 1024"),
        ([MAX_DATAGRAM + 1], MAX_DATAGRAM + 1, "a datagram of 65508 bytes, more than 65507"),
        ([1, 2], 2, "lengths add up to 3, the payload has 2 bytes"),
        ([1, 2], 4, "lengths add up to 3, the payload has 4 bytes"),
        ([], 1, "lengths add up to 0, the payload has 1 bytes"),
    ],
)
def test_check_refuses_each_broken_invariant(lengths: list[int], size: int, reason: str) -> None:
    """ValueError names the invariant that does not hold."""
    with pytest.raises(ValueError, match=reason):
        batch_of(lengths, size).check()


@pytest.mark.parametrize("lengths", [[], [0] * MAX_ROWS, [MAX_DATAGRAM], [MAX_DATAGRAM, 0, 1]])
def test_check_lets_the_limits_pass(lengths: list[int]) -> None:
    """A batch at its limits, or without rows, is sound."""
    batch_of(lengths, sum(lengths)).check()


@given(st.lists(st.binary(max_size=40), max_size=20), st.integers(1, 60), st.binary(min_size=1, max_size=3))
def test_datagrams_come_out_of_their_strides(payloads: list[bytes], stride: int, between: bytes) -> None:
    """Payloads that stand at multiples of a stride come out without what is between them."""
    payloads = [payload[:stride] for payload in payloads]
    whole = b"".join(payload + (between * stride)[: stride - len(payload)] for payload in payloads)
    together = make_batch(payloads, ["192.0.2.1", "::1"])
    for payload in (whole, memoryview(bytearray(whole))):
        batch = DatagramBatch("messages", 0, together.rows, payload, stride)
        batch.check()
        assert batch.offsets.tolist() == [number * stride for number in range(len(payloads) + 1)]
        assert list(batch.datagrams()) == list(together.datagrams())


@pytest.mark.parametrize(
    ("lengths", "size", "stride", "reason"),
    [
        ([1, 2], 8, 5, "lengths add up to 10, the payload has 8 bytes"),
        ([1, 2], 3, 5, "lengths add up to 10, the payload has 3 bytes"),
        ([1, 2], 11, 5, "lengths add up to 10, the payload has 11 bytes"),
        ([5, 6, 0], 15, 5, "a datagram of 6 bytes, they begin every 5"),
        ([MAX_DATAGRAM], 1, 1, "a datagram of 65507 bytes, they begin every 1"),
        ([], 5, 5, "lengths add up to 0, the payload has 5 bytes"),
        ([1], 5, -5, "lengths add up to -5, the payload has 5 bytes"),
    ],
)
def test_check_refuses_what_does_not_fit_its_stride(lengths: list[int], size: int, stride: int, reason: str) -> None:
    """ValueError says when the buffer is not one stride a row, or a datagram would reach into the next."""
    with pytest.raises(ValueError, match=reason):
        batch_of(lengths, size, stride).check()


@pytest.mark.parametrize(("lengths", "stride"), [([], 7), ([7, 0, 7], 7), ([MAX_DATAGRAM] * 2, MAX_DATAGRAM)])
def test_check_lets_full_strides_pass(lengths: list[int], stride: int) -> None:
    """A datagram may fill its stride."""
    batch_of(lengths, len(lengths) * stride, stride).check()


def test_addresses_may_be_a_column() -> None:
    """Rows are the same from packed addresses and from an array of them."""
    packed = [bytes(range(16)), bytes(reversed(range(16)))]
    column = np.frombuffer(b"".join(packed), np.uint8).reshape(2, 16)
    assert make_rows([1, 2], packed, [3, 4]).tobytes() == make_rows([1, 2], column, [3, 4]).tobytes()


def test_parts_and_payloads_of_a_batch_in_place() -> None:
    """Rows of a batch, and its payloads packed, are the same whether they stand end to end or at a distance."""
    payloads = [b"one", b"", b"three", b"4"]
    close = make_batch(payloads)
    apart = DatagramBatch("messages", 1, close.rows, b"".join(each.ljust(8, b"-") for each in payloads), 8)
    assert close.packed() == apart.packed() == b"onethree4"
    for batch in (close, apart):
        assert [payload for _, _, payload in batch.part(1, 3).datagrams()] == [b"", b"three"]
        assert batch.part(0, 4) is batch


@given(st.one_of(st.lists(st.integers(0, 9)), st.integers(0, 9).map(lambda size: [size] * 30)), st.booleans())
def test_payloads_at_a_distance_are_packed(lengths: list[int], whole: bool) -> None:
    """They follow each other then, alike in length or not; behind the last one there need not be anything."""
    payloads = [bytes([65 + number % 26]) * length for number, length in enumerate(lengths)]
    apart = b"".join(each.ljust(9, b"-") for each in payloads)
    if not whole and lengths:
        apart = apart[: 9 * (len(lengths) - 1) + lengths[-1]]
    assert DatagramBatch("messages", 1, make_batch(payloads).rows, apart, 9).packed() == b"".join(payloads)


@given(st.lists(st.integers(0, 300), max_size=40), st.sampled_from((0, 300)), st.integers(1, 900))
def test_parts_are_the_batch_in_pieces_that_fit(lengths: list[int], stride: int, most: int) -> None:
    """All rows come in order; each part has at most so many bytes of payloads, or one datagram."""
    size = stride * len(lengths) or sum(lengths)
    batch = batch_of(lengths, size, stride)
    parts = [*batch.parts(most)]
    assert [each for part in parts for each in part.datagrams()] == [*batch.datagrams()]
    for part in parts:
        part.check()
        assert len(part) <= 1 or sum(part.length_list) <= most


sizes = st.sampled_from([0, 0, 1, 1464, 32_768, MAX_DATAGRAM - 1, MAX_DATAGRAM])


@given(
    st.lists(st.tuples(sizes | st.integers(0, MAX_DATAGRAM), st.integers(1, 600)), min_size=1, max_size=5),
    st.sampled_from([MAX_DATAGRAM, MAX_PAYLOAD, CHUNK]),
)
def test_parts_could_not_be_longer(runs: list[tuple[int, int]], most: int) -> None:
    """The parts hold all datagrams in order, once; each fits its place, and a row more would not."""
    lengths = [length for length, count in runs for _ in range(count)]
    parts = [part.length_list for part in batch_of(lengths, sum(lengths)).parts(most)]
    assert [length for part in parts for length in part] == lengths
    for part, following in pairwise(parts):
        assert sum(part) <= most
        assert len(part) == MAX_ROWS or sum(part) + following[0] > most
    assert sum(parts[-1]) <= most
    assert max(map(len, parts)) <= MAX_ROWS


@pytest.mark.parametrize("most", [MAX_PAYLOAD, CHUNK])
def test_ordinary_batch_is_not_cut(most: int) -> None:
    """A batch that fits a message, or a chunk, is one part; what is a byte too much begins the next."""
    each = most // MAX_ROWS
    ordinary = batch_of([each] * MAX_ROWS, most)
    assert [*ordinary.parts(most)] == [ordinary]
    longer = batch_of([each] * (MAX_ROWS - 1) + [each + 1], most + 1)
    assert [len(part) for part in longer.parts(most)] == [MAX_ROWS - 1, 1]
