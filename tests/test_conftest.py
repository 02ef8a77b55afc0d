"""The order of tests for workers that run them side by side."""

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import CHUNK, interleaved

numbers = st.integers(0, 300)


@given(numbers, numbers)
def test_each_test_is_run_once_and_kinds_are_mixed_evenly(waiting: int, working: int) -> None:
    """All tests of both kinds come, in their order; those that compute keep pace with those that wait."""
    found = [*interleaved([("waits", number) for number in range(waiting)], [("works", n) for n in range(working)])]
    assert [number for kind, number in found if kind == "waits"] == [*range(waiting)]
    assert [number for kind, number in found if kind == "works"] == [*range(working)]
    waited = 0
    for place, (kind, _) in enumerate(found, 1):
        waited += kind == "waits"
        if waiting:
            assert abs(place - waited - working * waited / waiting) <= CHUNK * (1 + working / waiting)


def test_workers_are_handed_as_many_tests_as_stay_together() -> None:
    """The Makefile says to pytest how many a worker is handed at a time."""
    assert f"--maxschedchunk {CHUNK}\n" in (Path(__file__).parent.parent / "Makefile").read_text()
