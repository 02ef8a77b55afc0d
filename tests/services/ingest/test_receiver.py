import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from services.ingest.receiver import cuts
from shared.batch import MAX_DATAGRAM, MAX_PAYLOAD, MAX_ROWS
from shared.mmsg import SLOT

sizes = st.sampled_from([0, 0, 1, 1464, 32_768, MAX_DATAGRAM - 1, MAX_DATAGRAM, MAX_DATAGRAM + 1, SLOT])


@settings(max_examples=300)
@given(st.lists(st.tuples(sizes | st.integers(0, SLOT), st.integers(1, 20)), min_size=1, max_size=20))
def test_cuts_cover_every_datagram_once(runs: list[tuple[int, int]]) -> None:
    """The stretches hold all datagrams that fit one, in order, once; each fits a message, and none could be longer."""
    lengths = [length for length, count in runs for _ in range(count)][:MAX_ROWS]
    stretches = list(cuts(np.array(lengths, np.uint32)))
    covered = [row for start, stop in stretches for row in range(start, stop)]
    assert covered == [row for row, length in enumerate(lengths) if length <= MAX_DATAGRAM]
    for start, stop in stretches:
        assert start < stop
        assert sum(lengths[start:stop]) <= MAX_PAYLOAD
        at_its_end = stop == len(lengths) or lengths[stop] > MAX_DATAGRAM
        assert at_its_end or sum(lengths[start : stop + 1]) > MAX_PAYLOAD


def test_ordinary_batch_is_not_cut() -> None:
    """A batch that fits a message is one stretch."""
    assert list(cuts(np.full(MAX_ROWS, 2048, np.uint32))) == [(0, MAX_ROWS)]
    assert list(cuts(np.full(MAX_ROWS, 2049, np.uint32))) == [(0, 255), (255, 256)]
