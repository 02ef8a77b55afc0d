import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.uplink.incoming.arrivals import Key
from services.uplink.nodes.crossings import MAX_WORKERS, SECONDS, Crossings

ORIGINS = [Key("bonn", f"ingest.{number}", 7, "flows") for number in range(3)]


def crossed(batches: list[tuple[int, int]]) -> tuple[Crossings, list[tuple[Key, int]]]:
    """Return crossings of batches, each of an origin and with a number of datagrams; and each datagram, in order."""
    crossings, totals = Crossings(lambda: 0.0), dict.fromkeys(ORIGINS, 0)
    datagrams: list[tuple[Key, int]] = []
    for number, count in batches:
        origin = ORIGINS[number]
        start, here = totals[origin], len(datagrams)
        crossings.note(origin, range(start, start + count), range(here, here + count))
        datagrams += [(origin, totals[origin] + each) for each in range(count)]
        totals[origin] += count
    return crossings, datagrams


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 5)), max_size=30), st.data())
def test_counts_of_origins_tell_the_place_here(batches: list[tuple[int, int]], data: st.DataObject) -> None:
    """A count here, told as counts of origins, comes back as the same count; all before it is within these."""
    crossings, datagrams = crossed(batches)
    here = data.draw(st.integers(0, len(datagrams)))
    reached = crossings.origins_at(here)
    assert sum(reached.values()) == here
    assert crossings.here_at(reached) == here


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 5)), max_size=30), st.tuples(*[st.integers(0, 40)] * 3))
def test_nothing_that_another_node_lacks_is_before_the_place(
    batches: list[tuple[int, int]], had: tuple[int, int, int]
) -> None:
    """A place stands before the first datagram that another node lacks, whatever it has had of each origin."""
    crossings, datagrams = crossed(batches)
    reached = dict(zip(ORIGINS, had, strict=True))
    here = crossings.here_at(reached)
    lacked = [place for place, (origin, number) in enumerate(datagrams) if number >= reached[origin]]
    assert here == (lacked[0] if lacked else len(datagrams))


def test_old_batches_are_known_by_their_end_alone() -> None:
    """After some seconds only the count behind a batch is known: memory does not grow, and a place is never lost."""
    now = 0.0
    crossings = Crossings(lambda: now)
    for number in range(1000):
        now = float(number)
        place = range(10 * number, 10 * number + 10)
        crossings.note(ORIGINS[0], place, place)
    assert len(crossings._latest) <= SECONDS + 1
    assert crossings.origins_at(10_000) == {ORIGINS[0]: 10_000}
    assert crossings.here_at({ORIGINS[0]: 9_995}) == 9_995


def test_what_was_left_out_here_is_passed() -> None:
    """Of a batch that did not come here whole, all that is lacking elsewhere is behind the place."""
    crossings = Crossings(lambda: 0.0)
    crossings.note(ORIGINS[0], range(10), range(10))
    crossings.note(ORIGINS[0], range(10, 20), range(10, 13))
    crossings.note(ORIGINS[1], range(50, 60), range(13, 13))
    crossings.note(ORIGINS[1], range(60, 64), range(13, 17))
    assert crossings.here_at({ORIGINS[0]: 15, ORIGINS[1]: 64}) == 10
    assert crossings.here_at({ORIGINS[0]: 20, ORIGINS[1]: 50}) == 13
    assert crossings.origins_at(12) == {ORIGINS[0]: 10, ORIGINS[1]: 50}
    assert crossings.origins_at(13) == {ORIGINS[0]: 20, ORIGINS[1]: 60}
    assert crossings.origins_at(15) == {ORIGINS[0]: 20, ORIGINS[1]: 62}


def test_a_worker_that_starts_again_and_again_does_not_fill_the_memory() -> None:
    """Of each worker the counts of its last two starts are known, however often others were started since."""
    now = 0.0
    crossings = Crossings(lambda: now)
    crossings.note(ORIGINS[0], range(10), range(10))
    for boot in range(1000):
        now += SECONDS
        crossings.note(ORIGINS[1]._replace(boot=boot), range(5), range(10 + 5 * boot, 15 + 5 * boot))
    latest = [ORIGINS[1]._replace(boot=boot) for boot in range(998, 1000)]
    assert crossings.origins_at(5010) == {ORIGINS[0]: 10, **dict.fromkeys(latest, 5)}
    assert crossings._ends == crossings.origins_at(5010)


def test_workers_without_end_do_not_fill_the_memory() -> None:
    """Of any number of workers of another node those are known that sent last, one that sends on among them."""
    now = 0.0
    crossings = Crossings(lambda: now)
    for number in range(2 * MAX_WORKERS):
        now += SECONDS
        for origin in (ORIGINS[0], Key("bonn", f"ingest.{number + 9}", 7, "flows")):
            crossings.note(origin, range(5), range(5))
    assert len(crossings._older) == MAX_WORKERS
    assert crossings._ends.keys() == crossings.origins_at(5).keys() >= {ORIGINS[0]}


@pytest.mark.parametrize("journaled", [False, True])
def test_what_another_node_lacks_of_old_batches_is_counted_or_read_from_a_journal(journaled: bool) -> None:
    """Of batches that are not known singly any more a node may lack some: their number is known, by origin.

    Where there is a journal, the place is before them.
    """
    now = 0.0
    crossings = Crossings(lambda: now, journaled=journaled)
    for number in range(1000):
        now = float(number)
        crossings.note(ORIGINS[0], range(10 * number, 10 * number + 10), range(20 * number, 20 * number + 10))
        crossings.note(ORIGINS[1], range(10 * number, 10 * number + 10), range(20 * number + 10, 20 * number + 20))
    known = int(10 * (now - SECONDS))
    for had in (15, 500, 4321):
        reached = {ORIGINS[0]: had, ORIGINS[1]: 10_000}
        place = crossings.here_at(reached)
        if journaled:
            assert (place <= 2 * had, crossings.lacked(reached)) == (True, 0)
        else:
            assert (place, crossings.lacked(reached)) == (2 * known, known - had)
    assert crossings.lacked({ORIGINS[0]: 10_000, ORIGINS[1]: 10_000}) == 0


def test_what_came_before_this_process_is_lacked_where_another_node_has_not_had_it() -> None:
    """An uplink was restarted: what it had before of an origin is not here, and another node may have had less."""
    for journaled in (False, True):
        crossings = Crossings(lambda: 0.0, journaled=journaled)
        crossings.note(ORIGINS[0], range(700, 710), range(10))
        assert (crossings.here_at({ORIGINS[0]: 200}), crossings.lacked({ORIGINS[0]: 200})) == (0, 500)


@pytest.mark.parametrize("journaled", [False, True])
def test_nothing_is_lacked_of_a_start_that_has_ended_where_a_later_one_is_told(journaled: bool) -> None:
    """Starts of a worker come one after the other: a node that was restarted since tells of the later one alone."""
    crossings = Crossings(lambda: 0.0, journaled=journaled)
    later = ORIGINS[0]._replace(boot=8)
    crossings.note(ORIGINS[0], range(700, 710), range(10))
    crossings.note(later, range(5), range(10, 15))
    assert (crossings.here_at({later: 3}), crossings.lacked({later: 3})) == (13, 0)
    assert (crossings.here_at({}), crossings.lacked({})) == (0, 700)
    assert (crossings.here_at({ORIGINS[0]: 710}), crossings.lacked({ORIGINS[0]: 710})) == (10, 0)
