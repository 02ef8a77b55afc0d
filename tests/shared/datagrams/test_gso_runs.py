import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from shared.datagrams.gso_runs import MAX_SEND, group


def grouped(lengths: list[int], largest_segment: int = 65_508, apart: list[int] | None = None) -> list[list[int]]:
    """The lengths that each send holds; `apart` are rows that begin a send."""
    mask = None if apart is None else np.isin(np.arange(len(lengths)), apart)
    starts = group(np.array(lengths, np.int64), largest_segment, mask).tolist()
    return [lengths[start:stop] for start, stop in zip(starts, [*starts[1:], len(lengths)], strict=True)]


def test_run_of_equal_lengths_is_one_send() -> None:
    """Neighbours of one length go together, as many as a send may hold, with a shorter one behind them."""
    assert grouped([100] * 5 + [40]) == [[100] * 5 + [40]]
    assert grouped([100] * 130) == [[100] * 64, [100] * 64, [100] * 2]
    assert grouped([30_000] * 5) == [[30_000] * 2, [30_000] * 2, [30_000]]
    assert grouped([100] * 64 + [40]) == [[100] * 64, [40]]


def test_only_what_can_end_a_send_is_taken_along() -> None:
    """A longer one, one of a run of its own, an empty one and one that is already taken along begin sends."""
    assert grouped([100, 200]) == [[100], [200]]
    assert grouped([200, 200, 100, 100]) == [[200, 200], [100, 100]]
    assert grouped([100, 0, 50]) == [[100], [0], [50]]
    assert grouped([400, 300, 200, 100]) == [[400, 300], [200, 100]]
    assert grouped([32_500, 32_499]) == [[32_500, 32_499]]
    assert grouped([32_500, 32_500, 1]) == [[32_500, 32_500], [1]]


def test_what_is_longer_than_a_segment_goes_alone() -> None:
    """Beyond the path's MTU nothing is segmented, and 0 segments nothing at all."""
    assert grouped([1465, 1465, 1464, 1464], 1464) == [[1465], [1465], [1464, 1464]]
    assert grouped([1465, 1464], 1464) == [[1465], [1464]]
    assert grouped([100, 100, 50], 0) == [[100], [100], [50]]


def test_rows_that_are_apart_begin_a_send() -> None:
    """A row that is to stand apart joins nothing before it, neither a run of its length nor as a shorter last one."""
    assert grouped([100] * 6, apart=[2]) == [[100] * 2, [100] * 4]
    assert grouped([100, 50], apart=[1]) == [[100], [50]]
    assert grouped([100, 100, 50], apart=[0, 1]) == [[100], [100, 50]]


@given(st.lists(st.sampled_from([0, 50, 100, 1464]), min_size=1, max_size=60), st.lists(st.integers(0, 60)))
def test_groups_hold_every_row_once_and_none_across_a_border(lengths: list[int], apart: list[int]) -> None:
    """Sends hold all rows in order, and no border lies inside one, whatever the lengths and borders."""
    groups = grouped(lengths, 1464, apart)
    assert [length for each in groups for length in each] == lengths
    starts = {sum(map(len, groups[:number])) for number in range(len(groups))}
    assert {row for row in apart if row < len(lengths)} <= starts
    assert all(sum(each) <= MAX_SEND and max(each) == each[0] for each in groups)
