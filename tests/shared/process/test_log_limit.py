from concurrent.futures import ThreadPoolExecutor

from hypothesis import given
from hypothesis import strategies as st

from shared.process.log_limit import LINES_A_SECOND, LINES_AT_ONCE, MAX_EVENTS, LogBudget, LogLimit


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_each_event_is_said_once_in_its_time_with_how_many_there_were() -> None:
    """The first is said at once, then one a second with the number of all since, whatever else is said meanwhile."""
    clock = Clock()
    restraint = LogLimit(1.0, clock)
    assert [restraint.admit("a") for _ in range(10_000)] == [1] + [0] * 9_999
    assert restraint.admit("b", 5) == 5
    clock.now += 0.9
    assert (restraint.admit("a"), restraint.admit("b", 2)) == (0, 0)
    clock.now += 0.2
    assert (restraint.admit("a"), restraint.admit("b", 2)) == (10_001, 4)
    clock.now += 1.0
    assert (restraint.admit("a"), restraint.admit("b")) == (1, 1)


@given(st.lists(st.tuples(st.integers(0, 2 * MAX_EVENTS), st.sampled_from([0.0, 0.01, 0.6])), max_size=1500))
def test_no_number_of_different_events_makes_more_lines(events: list[tuple[int, float]]) -> None:
    """No more than a limited number of texts is logged in any second, or kept in mind, however many there are."""
    clock, said = Clock(), list[float]()
    restraint = LogLimit(1.0, clock)
    for number, seconds in [*((number, 0.0) for number in range(2 * MAX_EVENTS)), *events]:
        clock.now += seconds
        if restraint.admit(f"event {number}"):
            said.append(clock.now)
        assert len(restraint._known) <= MAX_EVENTS
    assert all(sum(begin <= each < begin + 1 for each in said) <= MAX_EVENTS for begin in set(said))
    clock.now += 1.1
    assert restraint.admit("yet another") == 1


def test_threads_share_it() -> None:
    """Of what several threads provoke at once one is said, and none is forgotten in the number."""
    clock = Clock()
    restraint = LogLimit(1.0, clock)
    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(lambda _: restraint.admit("a"), range(8000))) == 1
    clock.now += 1.0
    assert restraint.admit("a") == 8000


@given(st.lists(st.sampled_from([0.0, 0.01, 0.3, 5.0]), min_size=1, max_size=400))
def test_lines_of_a_kind_have_a_budget(pauses: list[float]) -> None:
    """Lines beyond the budget are left out, and the next line stands for them: none is forgotten."""
    clock = Clock()
    budget, began, said = LogBudget(clock), clock.now, list[int]()
    for pause in pauses:
        clock.now += pause
        said.append(budget.admit())
        assert sum(map(bool, said)) <= LINES_AT_ONCE + (clock.now - began) * LINES_A_SECOND + 1e-6
    clock.now += 1.0
    assert sum(said) + budget.admit() == len(pauses) + 1
