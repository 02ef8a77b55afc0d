import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from services.transmitter.packets.headers import sum_payloads
from shared.datagrams.batch import DatagramBatch
from shared.datagrams.gathered import Gathered
from tests.builders import make_batch

equal = st.integers(1, 40).flatmap(lambda size: st.lists(st.binary(min_size=size, max_size=size), min_size=1))
any_payloads = st.lists(st.binary(max_size=40), min_size=1)


def strided(payloads: list[bytes], stride: int) -> DatagramBatch:
    """A batch with payloads at multiples of a stride, 0: end to end; between them is what must not be counted."""
    batch = make_batch(payloads)
    if not stride:
        return batch
    whole = b"".join(payload.ljust(stride, b"\xa7") for payload in payloads)
    return DatagramBatch(batch.stream, batch.received_ns, batch.rows, memoryview(whole), stride)


def word_sum(payload: bytes) -> int:
    """The sum of the 16-bit words of a payload, modulo 65535."""
    padded = payload + bytes(len(payload) % 2)
    return sum(int.from_bytes(padded[at : at + 2]) for at in range(0, len(padded), 2)) % 0xFFFF


@given(
    st.lists(st.tuples(equal | any_payloads, st.sampled_from([0, 40, 41, 64, 101])), min_size=1, max_size=4), st.data()
)
def test_sums_are_those_of_the_payloads_alone(found: list[tuple[list[bytes], int]], data: st.DataObject) -> None:
    """Bytes between payloads are in no sum, whatever the strides of the batches, odd ones too."""
    batch = Gathered([strided(payloads, stride) for payloads, stride in found])
    expected = [word_sum(payload) for payloads, _ in found for payload in payloads]
    rows = data.draw(st.lists(st.integers(0, len(expected) - 1)))
    sums = sum_payloads(batch, np.array(rows, np.intp))
    assert [int(each) % 0xFFFF for each in sums] == [expected[row] for row in rows]


@given(st.integers(1, 20), st.integers(1, 5), st.sampled_from([0, 40, 41, 64]))
def test_sums_of_equal_payloads_are_taken_at_their_strides(size: int, count: int, stride: int) -> None:
    """Payloads of one even length, which are summed together, are read where they stand."""
    generator = np.random.default_rng(size * 7 + count)
    payloads = [generator.bytes(2 * size) for _ in range(count)]
    batch = Gathered([strided(payloads, stride), strided(payloads[::-1], 0)])
    sums = sum_payloads(batch, np.arange(2 * count))
    assert [int(each) % 0xFFFF for each in sums] == [word_sum(payload) for payload in payloads + payloads[::-1]]
