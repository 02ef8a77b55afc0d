from services.uplink.outgoing.cursors import MAX_WORKERS, Cursors
from services.uplink.packs import Pack
from services.uplink.subjects import Origin
from shared.bus.kept_counts import KeptCounts

STREAM, WORKER = "flows", ("ingest.1", 7)


def kept_counts() -> KeptCounts:
    """Counters that no file keeps."""
    return KeptCounts(lambda: None)


def pack(first: int, stop: int) -> Pack:
    """A message of a batch that ends at a count."""
    return Pack(Origin("berlin", STREAM, WORKER[0]), WORKER[1], first, first, stop, b"", stop, 1000 + first)


def begun(total: int = 100) -> Cursors:
    """Cursors with one worker."""
    cursors = Cursors(STREAM, kept_counts)
    cursors.begin(WORKER, total, 1000)
    return cursors


def kept(cursors: Cursors) -> int:
    """The place that a successor goes on from."""
    left = Cursors(STREAM, kept_counts)
    left.restore({name: dict(counts) for name, counts in cursors.tables().items()})
    assert left.begun(WORKER) == cursors.begun(WORKER)
    return left.passed(WORKER)


def test_the_kept_place_goes_on_with_the_oldest_that_is_open() -> None:
    """A message that is acknowledged before an earlier one moves the kept place only once that one is, too."""
    cursors = begun()
    one, two, three = pack(1, 110), pack(2, 125), pack(3, 130)
    for each in (one, two, three):
        cursors.put(each)
    assert (cursors.passed(WORKER), kept(cursors), cursors.owed(WORKER, 140)) == (130, 100, 40)
    cursors.settle(two)
    assert kept(cursors) == 100
    cursors.settle(one)
    assert kept(cursors) == 125
    cursors.settle(one)
    cursors.settle(three)
    assert (kept(cursors), cursors.owed(WORKER, 140)) == (130, 10)


def test_what_can_not_be_had_is_passed_over_in_its_turn() -> None:
    """A gap moves the kept place at once if nothing before it is open, and else with what is."""
    cursors = begun()
    cursors.skip(WORKER, 105)
    assert (kept(cursors), cursors.passed(WORKER)) == (105, 105)
    cursors.put(one := pack(1, 110))
    cursors.skip(WORKER, 120)
    assert (kept(cursors), cursors.passed(WORKER)) == (105, 120)
    cursors.settle(one)
    assert kept(cursors) == 120


def test_starts_that_were_followed_by_others_are_forgotten_first() -> None:
    """The table is bounded: a worker that starts again and again drives out its own starts, and no other worker."""
    cursors = begun()
    assert cursors.begin(WORKER, 500, 0).total == 100
    for boot in range(2 * MAX_WORKERS):
        cursors.begin(("ingest.2", boot), 0, 0)
    assert ("ingest.2", 0) not in cursors
    assert ("ingest.2", 2 * MAX_WORKERS - 1) in cursors
    cursors.put(pack(1, 110))
    assert (cursors.passed(WORKER), len(list(cursors.places()))) == (110, MAX_WORKERS)


def test_a_worker_beyond_the_bound_is_not_taken() -> None:
    """Of more workers than the table has room for the last gets no place; a new start of one that has gets one."""
    cursors = begun()
    for number in range(MAX_WORKERS - 1):
        cursors.begin((f"ingest.{number + 2}", 7), 0, 0)
    new, again = ("ingest.9999", 7), (WORKER[0], 8)
    assert (cursors.takes(WORKER), cursors.takes(new), cursors.takes(again)) == (True, False, True)
    cursors.begin(again, 0, 0)
    assert (WORKER in cursors, again in cursors, len(list(cursors.places()))) == (False, True, MAX_WORKERS)


def test_what_is_forgotten_has_no_place() -> None:
    """A start that was forgotten while messages of it are under way ends nothing: it is owed nothing, and kept not."""
    cursors = Cursors(STREAM, kept_counts)
    cursors.put(pack(1, 110))
    cursors.skip(WORKER, 120)
    cursors.settle(pack(1, 110))
    assert (cursors.passed(WORKER), cursors.begun(WORKER), cursors.owed(WORKER, 9), cursors.tables()) == (-1, 0, 0, {})
