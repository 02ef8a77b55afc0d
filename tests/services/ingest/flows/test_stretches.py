from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from services.ingest.flows.stretches import Hole, moved, overlap, without

stretches = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 12)).map(lambda each: (each[0], sum(each))))
in_order = st.lists(st.integers(0, 60), unique=True).map(sorted).map(lambda edges: [*pairwise(edges)][::2])


def numbers(parts: list[tuple[int, int]]) -> set[int]:
    """All numbers of some stretches."""
    return {number for start, stop in parts for number in range(start, stop)}


@given(stretches, stretches)
def test_a_gap_without_stretches_lacks_their_numbers(gaps: list[tuple[int, int]], taken: list[tuple[int, int]]) -> None:
    """Of each gap, wherever it is, just the numbers that no stretch has are left, in order, and in no empty piece."""
    for number, (start, stop) in enumerate(gaps):
        left = without([Hole(start, stop, old=bool(number % 2))], taken)
        assert [each for hole in left for each in range(hole.start, hole.stop)] == sorted(
            numbers([(start, stop)]) - numbers(taken)
        )
        assert all(hole.start < hole.stop and hole.old == bool(number % 2) for hole in left)
    alone = [piece for start, stop in gaps for piece in without([Hole(start, stop)], taken)]
    assert without([Hole(start, stop) for start, stop in gaps], taken) == alone


@given(in_order, in_order, st.integers(-9, 9))
def test_stretches_overlap_where_they_share_a_number(
    one: list[tuple[int, int]], other: list[tuple[int, int]], shift: int
) -> None:
    """Two lists of stretches overlap if any number is in both, whatever the count that they stand in."""
    assert overlap(one, other) == bool(numbers(one) & numbers(other))
    assert overlap(moved(one, shift), moved(other, shift)) == overlap(one, other)
