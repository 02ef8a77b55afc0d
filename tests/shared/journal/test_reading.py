from itertools import pairwise
from pathlib import Path

import pytest

from shared.bus.bodies.journal_messages import JournalPlace, JournalRead, WorkerPosition
from shared.datagrams.batch import DatagramBatch
from shared.journal.directory import segments_in, set_aside
from shared.journal.reading import PastBatches, read_portion
from shared.journal.records import Identity
from shared.journal.segments import SECOND
from tests.shared.journal.filled import NOW, as_written, batch_of, identities, read_all, times, write_segment

Batches = list[tuple[Identity, DatagramBatch]]


def batches_of(worker: str, boot: int, count: int, at_ns: int = NOW) -> Batches:
    """Return batches of two rows, one a second."""
    return [
        (identity, batch_of([("192.0.2.1", 1, f"{worker} {boot} {identity.sequence}".encode())] * 2, at))
        for identity, at in zip(identities(worker, boot, rows=[2] * count), times(count), strict=True)
        for at in [at - NOW + at_ns]
    ]


@pytest.fixture
def two_workers(tmp_path: Path) -> tuple[Path, Batches]:
    """A journal in three segments: two workers in turn, the first of which is started anew in the middle."""
    one, two = batches_of("ingest.1", 5, 6), batches_of("ingest.2", 9, 12)
    again = batches_of("ingest.1", 3, 6, NOW + 6 * SECOND)  # boot ids do not grow
    order = [each for pair in zip([*one, *again], two, strict=True) for each in pair]
    for number in range(3):
        write_segment(tmp_path / "flows", order[8 * number : 8 * number + 8], number + 1)
    return tmp_path / "flows", order


@pytest.mark.parametrize("rows", [1, 5, 1000])
@pytest.mark.parametrize("use_places", [True, False])
def test_every_worker_goes_on_from_its_own_position(
    two_workers: tuple[Path, Batches], rows: int, use_places: bool
) -> None:
    """From each worker's position on all comes, over its restart, in the order written, in portions of any size."""
    directory, order = two_workers
    for first in range(7):
        for second in (0, 3, 11):
            start = (
                WorkerPosition("ingest.1", 5, first, 2 * first, NOW + (first - 1) * SECOND),
                WorkerPosition("ingest.2", 9, second, 2 * second, NOW + (second - 1) * SECOND),
            )
            expected = [
                as_written(*each)
                for each in order
                if (each[0].worker == "ingest.2" and each[0].sequence >= second)
                or (each[0].worker == "ingest.1" and (each[0].boot == 3 or each[0].sequence >= first))
            ]
            found, portion = read_all(directory, *start, rows=rows, use_places=use_places)
            assert found == expected
            assert (portion.missing, portion.expired, portion.damaged) == (0, 0, 0)
            assert portion.positions["ingest.1", 3].boot == 3


def test_a_position_within_a_batch_brings_it_again(two_workers: tuple[Path, Batches]) -> None:
    """A reader that has had a part of a batch gets all of it; one that had all does not."""
    directory, _ = two_workers
    for total, first in ((2, 1), (3, 1), (4, 2)):
        found, _ = read_all(directory, WorkerPosition("ingest.2", 9, 99, total, NOW), since_ns=1 << 62)
        assert found[0][0].sequence == first


def test_since_a_time_for_workers_that_are_not_known(two_workers: tuple[Path, Batches]) -> None:
    """Without a position all that came at that time or later is read, and nothing before it counts as missing."""
    directory, order = two_workers
    found, portion = read_all(directory, since_ns=NOW + 4 * SECOND)
    assert found == [as_written(*each) for each in order if each[1].received_ns >= NOW + 4 * SECOND]
    assert (portion.missing, portion.expired) == (0, 0)


@pytest.mark.parametrize("place", [JournalPlace(99, 0), JournalPlace(2, 12345), JournalPlace(1, 1 << 40), None])
def test_a_place_that_is_none_does_no_harm(two_workers: tuple[Path, Batches], place: JournalPlace | None) -> None:
    """A place that is of another journal, or within a record, costs a search and no batch that follows it."""
    directory, order = two_workers
    start = [WorkerPosition("ingest.1", 3, 5, 10, NOW + 10 * SECOND), WorkerPosition("ingest.2", 9, 11, 22, NOW)]
    wanted = JournalRead(1, "replay/forwarder.1.a/", "flows", 0, start, place=place)
    portion = read_portion(directory, lambda: segments_in(directory.parent, "flows"), wanted)
    assert [as_written(*each) for each in portion.batches] == [as_written(*each) for each in order[-2:]]


def test_a_segment_that_is_sealed_or_removed_meanwhile(two_workers: tuple[Path, Batches]) -> None:
    """A list of segments that is out of date is read all the same: sealed ones by their other name, gone ones not."""
    directory, order = two_workers
    stale = segments_in(directory.parent, "flows")
    (directory / stale[0].name).unlink()
    stale = [type(each)(each.stream, each.number, each.began_ns, is_open=each.number == 3) for each in stale]
    wanted = JournalRead(1, "replay/forwarder.1.a/", "flows", 0, [], rows=1 << 16)
    portion = read_portion(directory, lambda: stale, wanted)
    assert [as_written(*each) for each in portion.batches] == [as_written(*each) for each in order[8:]]
    assert portion.at_end


def test_a_worker_that_was_started_anew_while_the_clock_was_set_back(tmp_path: Path) -> None:
    """Its new datagrams are older by their time; they are read once its boot is known, from there on."""
    before, since = batches_of("ingest.1", 5, 3), batches_of("ingest.1", 3, 4, NOW - 3600 * SECOND)
    write_segment(tmp_path / "flows", [*before, *since], 1)
    had = WorkerPosition("ingest.1", 5, 3, 6, NOW + 2 * SECOND)
    assert read_all(tmp_path / "flows", had)[0] == []
    for places in ([had, WorkerPosition("ingest.1", 3, 0, 2)], [WorkerPosition("ingest.1", 3, 0, 2), had]):
        found, portion = read_all(tmp_path / "flows", *places)
        assert found == [as_written(*each) for each in since[1:]]
        assert (portion.missing, portion.expired) == (0, 0)


def test_a_clock_that_was_wrong_for_a_while_hides_nothing(tmp_path: Path) -> None:
    """It was an hour ahead: an export has all of the time that it is asked for, and a reader all behind its place."""
    ahead = NOW + 3600 * SECOND
    at = [NOW, ahead, NOW + 60 * SECOND, NOW + 120 * SECOND]
    batches = [each for at_ns in at for _, each in batches_of("ingest.1", 5, 2, at_ns)]
    order = list(zip(identities("ingest.1", 5, rows=[2] * len(batches)), batches, strict=True))
    for number, (start, stop) in enumerate(pairwise((0, 2, 5, 6, 8)), 1):  # it was set back within the second one
        write_segment(tmp_path / "flows", order[start:stop], number)
    past = PastBatches(tmp_path / "flows", segments_in(tmp_path, "flows"), NOW, NOW + 600 * SECOND)
    assert [batch.received_ns for batch, _ in past.batches()] == [
        batch.received_ns for _, batch in order if batch.received_ns < ahead
    ]
    found, portion = read_all(tmp_path / "flows", WorkerPosition("ingest.1", 5, 3, 6, ahead))
    assert found == [as_written(*each) for each in order[3:]]
    assert (portion.missing, portion.expired) == (0, 0)


def test_segments_that_retention_removes_before_an_export_reads_them_are_counted(
    two_workers: tuple[Path, Batches],
) -> None:
    """The rest is read, and the count tells that it is not all."""
    directory, order = two_workers
    segments = segments_in(directory.parent, "flows")
    past = PastBatches(directory, segments, 0, 1 << 62)
    reading = past.batches()
    next(reading)
    (directory / segments[1].name).unlink()
    assert len(list(reading)) == len(order) - 8 - 1
    assert past.gone == 1


def test_segments_that_can_not_be_read_are_counted_and_the_rest_is_read(two_workers: tuple[Path, Batches]) -> None:
    """One can't be opened, and of another nothing can be read: the error is kept, and what comes behind is read."""
    directory, order = two_workers
    segments = segments_in(directory.parent, "flows")
    for segment in segments[:2]:
        (directory / segment.name).unlink()
    (directory / segments[0].name).symlink_to(segments[0].name)
    (directory / segments[1].name).mkdir()
    (directory / f"{segments[2].name}.zst").write_bytes(b"other bytes")
    past = PastBatches(directory, segments_in(directory.parent, "flows", unreadable=True), 0, 1 << 62)
    assert len(list(past.batches())) == len(order) - 16
    assert past.unread == {"Too many levels of symbolic links": 1, "Is a directory": 1}
    assert (past.gone, past.damaged) == (0, 0)


def test_segments_that_are_set_aside_or_compressed_are_counted(two_workers: tuple[Path, Batches]) -> None:
    """Segments that were set aside, or that another program has compressed, can't be read here: the count tells."""
    directory, order = two_workers
    first, second, _ = segments_in(directory.parent, "flows")
    set_aside(directory, first)
    (directory / second.name).rename(directory / f"{second.name}.zst")
    past = PastBatches(directory, segments_in(directory.parent, "flows", unreadable=True), 0, 1 << 62)
    assert len(list(past.batches())) == len(order) - 16
    assert past.unread == {"set aside": 1, "compressed": 1}


def test_segments_that_retention_removes_before_a_replay_goes_on_are_counted(
    two_workers: tuple[Path, Batches],
) -> None:
    """It goes on from a place in a segment that is not there any more, with what is behind it."""
    directory, order = two_workers
    for gone in segments_in(directory.parent, "flows")[:2]:
        (directory / gone.name).unlink()
    past = PastBatches(directory, segments_in(directory.parent, "flows"), 0, 1 << 62)
    assert len(list(past.batches(JournalPlace(1, 0)))) == len(order) - 16
    assert past.gone == 2


def test_a_replay_goes_on_in_a_journal_whose_numbers_have_begun_anew(two_workers: tuple[Path, Batches]) -> None:
    """Its place was in a segment of a directory that was emptied: all that is there now is behind it."""
    directory, order = two_workers
    past = PastBatches(directory, segments_in(directory.parent, "flows"), 0, 1 << 62)
    assert len(list(past.batches(JournalPlace(4, 1000)))) == len(order)
    assert past.gone == 1


@pytest.mark.parametrize("number", [2, 3, 4])
def test_a_number_that_was_given_again(two_workers: tuple[Path, Batches], number: int) -> None:
    """The newest segments were removed while no journal ran: a reader gets all that is new, and no old batch again."""
    directory, order = two_workers
    for gone in segments_in(directory.parent, "flows")[number - 1 :]:
        (directory / gone.name).unlink()
    new = batches_of("ingest.2", 9, 15, NOW)[12:]
    write_segment(directory, new, number)
    place, had = JournalPlace(min(number + 1, 3), 1 << 20, NOW + 6 * SECOND), order[-1][1].received_ns
    start = [WorkerPosition("ingest.1", 3, 6, 12, had), WorkerPosition("ingest.2", 9, 12, 24, had)]
    for at in (place, JournalPlace(number, 200, NOW + 6 * SECOND)):
        wanted = JournalRead(1, "replay/forwarder.1.a/", "flows", 0, start, place=at)
        portion = read_portion(directory, lambda: segments_in(directory.parent, "flows"), wanted)
        assert [as_written(*each) for each in portion.batches] == [as_written(*each) for each in new]
        past = PastBatches(directory, segments_in(directory.parent, "flows"), 0, 1 << 62)
        assert [batch.received_ns for batch, _ in past.batches(at, had)] == [each[1].received_ns for each in new]
        assert past.gone == 1


def test_segments_that_somebody_has_removed_are_counted(two_workers: tuple[Path, Batches]) -> None:
    """One in the middle is missing, as its number tells, where the span of time goes beyond it."""
    directory, order = two_workers
    (directory / segments_in(directory.parent, "flows")[1].name).unlink()
    for until_ns, gone in ((1 << 62, 1), (NOW + 2 * SECOND, 0)):
        past = PastBatches(directory, segments_in(directory.parent, "flows"), 0, until_ns)
        expected = [each for each in order[:8] + order[16:] if each[1].received_ns < until_ns]
        assert (len(list(past.batches())), past.gone) == (len(expected), gone)
