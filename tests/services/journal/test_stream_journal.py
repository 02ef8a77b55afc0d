import errno
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from services.journal import service, stream_journal
from services.journal.disk_thread import DiskThread
from services.journal.readers import MAX_WAITING, Readers
from services.journal.stream_journal import StreamJournal
from shared.bus.bodies.journal_messages import JournalPortion, JournalRead
from shared.bus.messages import Body
from shared.datagrams.batch import DatagramBatch
from shared.journal import reached
from shared.journal.directory import segments_in
from shared.journal.encoding import Numbered
from shared.journal.reading import PastBatches
from shared.journal.records import Identity, Reached
from shared.journal.retention import Bounds, expired
from shared.journal.segment_writer import SegmentWriter
from shared.journal.segments import SECOND, Segment
from shared.ledger.counters import DISK_ERROR, DISK_FULL, EXPIRED, KEPT_BYTES, SEGMENTS, TAKEN, WRITE_ERRNO, WRITTEN
from shared.settings.model import Settings
from shared.settings.tables import Journal
from tests.shared.journal.filled import batch_of, identities
from tests.stack import wait_until


@pytest.fixture
def disk() -> Iterator[DiskThread]:
    """The thread that waits for the disk."""
    thread = DiskThread()
    yield thread
    assert thread.close()


def test_an_error_of_the_disk_is_counted_and_passes(
    tmp_path: Path, disk: DiskThread, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Batches that the disk refuses are counted under their cause; once it takes them again, all is as before."""
    journal = StreamJournal("flows", tmp_path, 1 << 30, disk)
    journal.open()
    monkeypatch.setattr(stream_journal, "RETRY_SECONDS", 0.0)
    three = identities(rows=[2, 2, 2])
    batch = batch_of([("192.0.2.1", 1, b"one"), ("192.0.2.1", 1, b"two")])
    journal.append(three[0], batch)
    journal.write()

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as failing:
        failing.setattr(SegmentWriter, "append", fail)
        journal.append(three[1], batch)
        journal.write()
    failed = journal.report()
    assert (failed[TAKEN], failed[WRITTEN], failed[DISK_ERROR], failed[WRITE_ERRNO]) == (4, 2, 2, errno.EIO)
    assert "look at the disk" in capsys.readouterr().out
    journal.append(three[2], batch)
    journal.write()
    assert (journal.report()[WRITTEN], journal.report()[WRITE_ERRNO]) == (4, 0)
    journal.note_disk_error(OSError(errno.EIO, "Input/output error"))
    assert "the journal's disk fails" in capsys.readouterr().out
    journal.seal()


def test_what_there_is_room_for_is_written(
    tmp_path: Path, disk: DiskThread, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A disk that becomes full in the middle of batches that wait together keeps those before."""
    journal = StreamJournal("flows", tmp_path, 1 << 30, disk)
    journal.open()
    append, room = SegmentWriter.append, [3]

    def append_some(self: SegmentWriter, some: Sequence[Numbered]) -> None:
        if len(some) > room[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        room[0] -= len(some)
        append(self, some)

    monkeypatch.setattr(SegmentWriter, "append", append_some)
    for identity in identities(rows=[2] * 5):
        journal.append(identity, batch_of([("192.0.2.1", 1, b"one"), ("192.0.2.1", 1, b"two")]))
    assert (journal.report()[TAKEN], journal.report().get(WRITTEN)) == (10, None)
    journal.write()
    said = journal.report()
    assert (said[TAKEN], said[WRITTEN], said[DISK_FULL], said[WRITE_ERRNO]) == (10, 6, 4, errno.ENOSPC)
    assert journal.reached == {"ingest.1": Reached(9, 6)}
    assert "free some of the disk" in capsys.readouterr().out
    journal.seal()


def test_a_segment_that_nothing_fitted_into_leaves_no_gap(
    tmp_path: Path, disk: DiskThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full when a segment begins, for longer than one lasts: an export finds none missing afterwards."""
    monkeypatch.setattr(stream_journal, "SEGMENT_SECONDS", 0.0)
    monkeypatch.setattr(stream_journal, "RETRY_SECONDS", 0.0)
    journal = StreamJournal("flows", tmp_path, 1 << 30, disk)
    journal.open()

    def fail(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for number, identity in enumerate(identities(rows=[1] * 5)):
        with monkeypatch.context() as patch:
            if number in (1, 2, 4):
                patch.setattr(SegmentWriter, "append", fail)
            journal.append(identity, batch_of([("192.0.2.1", 1, b"one")]))
            journal.write()
        journal.keep_up()
        wait_until(partial(_sealed, journal, disk), "it is sealed")
    assert [path.name for path in (tmp_path / "flows").iterdir() if ".open" in path.name] == []
    past = PastBatches(tmp_path / "flows", segments_in(tmp_path, "flows"), 0, 1 << 62)
    assert len(list(past.batches())) == 2
    assert past.gone == 0


def test_segments_are_sealed_by_size_and_age(tmp_path: Path, disk: DiskThread, monkeypatch: pytest.MonkeyPatch) -> None:
    """A segment is sealed once it is large enough, or old enough though nothing comes; numbers grow over restarts."""
    monkeypatch.setattr(stream_journal, "SEGMENT_SECONDS", 0.0)
    for start in range(2):
        journal = StreamJournal("flows", tmp_path, 8 * 4096, disk)
        journal.open()
        for identity in identities(rows=[1] * 4):
            journal.append(identity, batch_of([("192.0.2.1", 1, bytes(1500))]))
            journal.write()
        assert len(journal.segments()) == 2 * start + 2
        journal.keep_up()
        wait_until(partial(_sealed, journal, disk), "all are sealed")
    assert [(each.number, each.is_open) for each in segments_in(tmp_path, "flows")] == [
        (number, False) for number in (1, 2, 3, 4)
    ]
    assert journal.report()[SEGMENTS] == 4


def write_two_workers(directory: Path, disk: DiskThread, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill six segments: the first with two workers, the others with one of them."""
    monkeypatch.setattr(stream_journal, "SEGMENT_BYTES", 1)
    journal = StreamJournal("flows", directory, 1 << 30, disk)
    journal.open()
    journal.append(Identity("ingest.2", 7, 0, 40), batch_of([("192.0.2.1", 1, b"once")]))
    journal.write()
    for identity in identities(rows=[1] * 5):
        journal.append(identity, batch_of([("192.0.2.1", 1, b"one")]))
        journal.write()
    wait_until(partial(_sealed, journal, disk), "all are sealed")


def left_by_two_workers(directory: Path, disk: DiskThread, monkeypatch: pytest.MonkeyPatch) -> StreamJournal:
    """Return the journal of the next process, which has opened these segments."""
    write_two_workers(directory, disk, monkeypatch)
    journal = StreamJournal("flows", directory, 1 << 30, disk)
    journal.open()
    return journal


def test_what_is_still_to_be_removed_is_known(
    tmp_path: Path, disk: DiskThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is slow: until it has removed a segment, its bytes count as going, so that no others go for them."""
    journal = left_by_two_workers(tmp_path, disk, monkeypatch)
    first, second, *rest = journal.kept()
    journal.remove(first)
    journal.remove(second)
    assert journal.going == first.size + second.size
    wait_until(lambda: disk.collect() or not journal.going, "they are removed")  # type: ignore[func-returns-value]
    assert journal.kept() == rest


def test_what_others_have_removed_is_not_there(
    tmp_path: Path, disk: DiskThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another program removes the directory: sealed segments are gone, and the present one once it is to be sealed."""
    write_two_workers(tmp_path, disk, monkeypatch)
    monkeypatch.setattr(stream_journal, "SEGMENT_BYTES", 1 << 20)
    journal = with_one_datagram(tmp_path, disk)
    shutil.rmtree(tmp_path / "flows")
    for each in journal.kept():
        if not each.segment.is_open:
            journal.remove(each)
    journal.seal()
    wait_until(lambda: disk.collect() or not (journal.going or journal.kept()), "all are known to be gone")  # type: ignore[func-returns-value]
    assert journal.report()[EXPIRED] == 1


@pytest.mark.parametrize("kept_too", [True, False])
def test_compressed_segments_count_and_go_in_their_turn(
    tmp_path: Path,
    disk: DiskThread,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kept_too: bool,
) -> None:
    """Another program compresses segments, before a start or behind it: they take room, and the oldest goes first.

    Where it is the newest that can't be read, the start says what that costs.
    """
    journal = left_by_two_workers(tmp_path, disk, monkeypatch)
    one, *_, six = sorted((tmp_path / "flows").iterdir())

    def compress(path: Path) -> None:
        path.with_name(f"{path.name}.zst").write_bytes(bytes(1000))
        if not kept_too:
            path.unlink()

    compress(one)
    journal.remove(journal.kept()[0])
    compress(six)
    wait_until(lambda: disk.collect() or not journal.going, "it is removed")  # type: ignore[func-returns-value]
    assert not one.with_name(f"{one.name}.zst").exists()
    size = sum(each.stat().st_size for each in (tmp_path / "flows").iterdir())
    journal = StreamJournal("flows", tmp_path, 1 << 30, disk)
    journal.open()
    assert [each.number for each in journal.segments()] == [2, 3, 4, 5, *([6] if kept_too else [])]
    said = capsys.readouterr().out
    for words in ("the newest segment is compressed", "compress none of the last minutes"):
        assert (words in said) == (not kept_too)
    assert (journal.report()[SEGMENTS], journal.report()[KEPT_BYTES]) == (5, size)
    journal.append(identities(rows=[1])[0], batch_of([("192.0.2.1", 1, b"one")]))
    journal.write()
    assert journal.segments()[-1].number == 7
    wait_until(partial(_sealed, journal, disk), "it is sealed")
    for each in journal.kept():
        journal.remove(each)
    wait_until(lambda: disk.collect() or not journal.going, "they are removed")  # type: ignore[func-returns-value]
    assert list((tmp_path / "flows").iterdir()) == []


def test_links_to_nowhere_do_no_harm(tmp_path: Path, disk: DiskThread, monkeypatch: pytest.MonkeyPatch) -> None:
    """A symbolic link that leads nowhere, or to itself, has the name of a segment: the journal starts with the rest."""
    left_by_two_workers(tmp_path, disk, monkeypatch)
    one, two, *_ = sorted((tmp_path / "flows").iterdir())
    for link, target in ((one, one), (two, tmp_path / "gone")):
        link.unlink()
        link.symlink_to(target)
    journal = StreamJournal("flows", tmp_path, 1 << 30, disk)
    journal.open()
    assert [each.segment.number for each in journal.kept()] == [1, 2, 3, 4, 5, 6]
    for each in journal.kept():
        journal.remove(each)
    wait_until(lambda: disk.collect() or not journal.going, "they are removed")  # type: ignore[func-returns-value]
    assert list((tmp_path / "flows").iterdir()) == []


def test_what_can_not_be_removed_does_not_keep_others(
    tmp_path: Path, disk: DiskThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A segment that can't be removed frees nothing: it is tried again, and others go for it."""
    journal = left_by_two_workers(tmp_path, disk, monkeypatch)
    first, second, *rest = journal.kept()
    bounds, unlink = Bounds(sum(each.size for each in journal.kept()) - 1, 0, 0), Path.unlink

    def refuse(path: Path, missing_ok: bool = False) -> None:
        if path.name == first.segment.name:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse)
    for expected in ([first.segment], [first.segment, second.segment]):
        going = expired(journal.kept(), bounds, 0, 0)
        assert [each.segment for each in going] == expected
        for each in going:
            journal.remove(each)
        wait_until(lambda: disk.collect() or not journal.going, "it was tried")  # type: ignore[func-returns-value]
    assert journal.segments() == [first.segment, *(each.segment for each in rest)]


def with_one_datagram(directory: Path, disk: DiskThread) -> StreamJournal:
    """A journal that has written a datagram."""
    journal = StreamJournal("flows", directory, 1 << 30, disk)
    journal.open()
    journal.append(identities(rows=[1])[0], batch_of([("192.0.2.1", 1, b"one")]))
    journal.write()
    return journal


@pytest.mark.parametrize("failing", ["fdatasync", "fsync"])
def test_what_can_not_be_sealed_goes_in_its_turn(
    tmp_path: Path, disk: DiskThread, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    """The disk is full when a segment is sealed: under whichever of its names it is there, retention removes it."""
    journal = with_one_datagram(tmp_path, disk)
    assert expired(journal.kept(), Bounds(1, 0, 0), 0, 0) == []

    def refuse(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, failing, refuse)
        journal.seal()
        assert expired(journal.kept(), Bounds(1, 0, 0), 0, 0) == []
        wait_until(lambda: disk.collect() or expired(journal.kept(), Bounds(1, 0, 0), 0, 0), "it may go")  # type: ignore[func-returns-value]
    journal.remove(*journal.kept())
    wait_until(lambda: disk.collect() or not journal.going, "it is removed")  # type: ignore[func-returns-value]
    assert list((tmp_path / "flows").iterdir()) == []


def test_other_programs_may_compress_segments_during_a_start(
    tmp_path: Path, disk: DiskThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A segment whose second form they remove is kept, and one that they have just put there is no fault."""
    left_by_two_workers(tmp_path, disk, monkeypatch)
    one, two, *_ = sorted((tmp_path / "flows").iterdir())
    one.with_name(f"{one.name}.zst").write_bytes(bytes(1000))

    def change(*arguments: Any, **options: Any) -> list[Segment]:
        if options:
            one.unlink(missing_ok=True)
            two.rename(two.with_name(two.name.replace("-000002", "-000099")))
        return segments_in(*arguments, **options)

    monkeypatch.setattr(stream_journal, "segments_in", change)
    journal = StreamJournal("flows", tmp_path, 1 << 30, disk)
    journal.open()
    assert [each.segment.number for each in journal.kept()] == [1, 3, 4, 5, 6]


@pytest.mark.parametrize("failing", ["fdatasync", "fsync"])
def test_what_could_not_be_sealed_is_sealed_once_the_disk_is_well(
    tmp_path: Path, disk: DiskThread, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    """A segment that the disk has refused to seal gets its last name without a restart, and is kept until then."""
    journal = with_one_datagram(tmp_path, disk)
    refused = list[int]()

    def refuse(descriptor: int) -> None:
        refused.append(descriptor)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def keep_up() -> bool:
        disk.collect()
        journal.keep_up()
        return len(refused) >= 3

    with monkeypatch.context() as patch:
        patch.setattr(os, failing, refuse)
        patch.setattr(os, "fsync", refuse)
        journal.seal()
        wait_until(keep_up, "it is tried again")
        assert len(journal.kept()) == 1

    wait_until(lambda: keep_up() and _sealed(journal, disk), "it is sealed")
    assert [each.is_open for each in segments_in(tmp_path, "flows")] == [False]
    assert journal.segments() == segments_in(tmp_path, "flows")


def test_what_can_neither_be_sealed_nor_removed_may_go(
    tmp_path: Path, disk: DiskThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk refuses to seal a segment, and to remove it; then another program does, and it is known to be gone."""
    journal = with_one_datagram(tmp_path, disk)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", refuse)
        patch.setattr(os, "fsync", refuse)
        patch.setattr(Path, "unlink", refuse)
        journal.seal()
        wait_until(lambda: disk.collect() or not journal.kept()[0].busy, "that was tried")  # type: ignore[func-returns-value]
        journal.remove(*journal.kept())
        wait_until(lambda: disk.collect() or not journal.going, "that was tried, too")  # type: ignore[func-returns-value]
    shutil.rmtree(tmp_path / "flows")
    journal.keep_up()
    wait_until(lambda: disk.collect() or not journal.kept(), "it is known to be gone")  # type: ignore[func-returns-value]


def test_a_small_disk_keeps_something(tmp_path: Path, disk: DiskThread, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a disk smaller than `min_free` half of it stays free, and the rest is for segments."""
    write_two_workers(tmp_path, disk, monkeypatch)
    own = Settings(journal=Journal(directory=str(tmp_path)))
    keeping, journal = service.JournalService("journal.1", own), StreamJournal("flows", tmp_path, 1 << 30, disk)
    journal.open()
    keeping._streams["flows"] = journal
    for free, left in ((500_000, 6), (499_999, 5)):
        monkeypatch.setattr(service, "room_on", lambda _, free=free: (free, 1_000_000))
        keeping._retain()
        assert len(journal.kept()) == left


def test_a_clock_that_is_ahead_for_a_while_costs_no_past(
    tmp_path: Path, disk: DiskThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Segments older than the limit go, but not while the clock may be wrong: after a start, or once set ahead."""
    write_two_workers(tmp_path, disk, monkeypatch)
    now, wall = [0.0], [time.time()]
    monkeypatch.setattr(service, "time", SimpleNamespace(
        monotonic=lambda: now[0], time=lambda: wall[0], time_ns=lambda: int(wall[0] * 1e9)))  # fmt: skip
    own = Journal(directory=str(tmp_path), age_seconds=86_400.0, min_free=0)
    keeping, journal = (
        service.JournalService("journal.1", Settings(journal=own)),
        StreamJournal("flows", tmp_path, 1 << 30, disk),
    )
    journal.open()
    keeping._streams["flows"] = journal

    def left_after(seconds: float, ahead: float = 0.0) -> int:
        now[0], wall[0] = now[0] + seconds, wall[0] + seconds + ahead
        keeping._retain()
        wait_until(lambda: disk.collect() or not journal.going, "it is removed")  # type: ignore[func-returns-value]
        return len(journal.kept())

    assert [left_after(1, 1e7), left_after(60), left_after(1, -1e7), left_after(4000)] == [6, 6, 6, 6]
    assert [left_after(1, 1e7), left_after(3598), left_after(2)] == [6, 6, 0]


def test_a_clock_that_was_ahead_makes_nothing_new_go_first(
    tmp_path: Path, disk: DiskThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock was a year ahead, and set right: what was kept meanwhile is the oldest, by size and by age."""
    journal = left_by_two_workers(tmp_path, disk, monkeypatch)
    now_ns, year = time.time_ns(), 365 * 86_400
    for number, each in journal._kept.items():
        journal._kept[number] = replace(each, ended_ns=now_ns + (number - 10 + year * (number < 4)) * SECOND)
    size = sum(each.size for each in journal.kept())

    def going(bounds: Bounds, seconds: int = 0) -> list[int]:
        return sorted(each.segment.number for each in expired(journal.kept(), bounds, now_ns + seconds * SECOND, 0))

    assert going(Bounds(size - 1, 0, 0)) == [1]
    assert going(Bounds(1, 0, 0)) == [1, 2, 3, 4, 5, 6]
    assert going(Bounds(0, 86_400, 0), 86_400 - 5) == [1, 2, 3, 4]


@pytest.mark.parametrize("damaged", [0, 1, 3])
def test_a_start_knows_workers_of_older_segments(
    tmp_path: Path, disk: DiskThread, monkeypatch: pytest.MonkeyPatch, damaged: int
) -> None:
    """A worker that has nothing in the newest segment is known all the same, also where its beginning is damaged."""
    write_two_workers(tmp_path, disk, monkeypatch)
    for segment in segments_in(tmp_path, "flows")[6 - damaged :]:
        path = tmp_path / "flows" / segment.name
        image = bytearray(path.read_bytes())
        image[image.index(reached.MAGIC) + 9] ^= 1
        path.write_bytes(image)
    journal = StreamJournal("flows", tmp_path, 1 << 30, disk)
    journal.open()
    assert journal.reached == {"ingest.1": Reached(9, 5), "ingest.2": Reached(7, 41)}


def _sealed(journal: StreamJournal, disk: DiskThread) -> bool:
    disk.collect()
    return not any(each.is_open for each in journal.segments())


def test_readers_wait_in_turn_up_to_a_limit(tmp_path: Path, disk: DiskThread) -> None:
    """Requests beyond the limit, or while memory is short, are refused at once, with a word and what to do."""
    said: list[JournalPortion] = []

    def publish(topic: str, body: Body, batch: DatagramBatch | None = None) -> bool:
        assert isinstance(body, JournalPortion), (topic, batch)
        said.append(body)
        return True

    journal = StreamJournal("flows", tmp_path, 1 << 30, disk)
    journal.open()
    readers = Readers(publish, {"flows": journal})
    request = JournalRead(1, "replay/forwarder.1.a/", "flows", 0, [])
    for _ in range(MAX_WAITING + 1):
        readers.add(request, memory_short=False)
    readers.add(request, memory_short=True)
    assert [each.error for each in said] == ["unavailable", "unavailable"]
    assert said[0].message == f"{MAX_WAITING} requests wait already; ask again in a second"
    assert "memory is short" in said[1].message
    assert readers.refused == 2
    while readers:
        readers.answer()
    assert [(each.error, each.at_end) for each in said[2:]] == [("", True)] * MAX_WAITING


def test_requests_that_have_waited_too_long_are_not_answered(tmp_path: Path, disk: DiskThread) -> None:
    """The disk is slow: nobody waits for the answers to old requests any more, and those to new ones come in time."""
    said: list[JournalPortion] = []
    journal = StreamJournal("flows", tmp_path, 1 << 30, disk)
    journal.open()
    now = [0.0]
    readers = Readers(lambda _topic, body, _batch=None: said.append(body) or True, {"flows": journal}, lambda: now[0])  # type: ignore[func-returns-value]
    for number in range(4):
        now[0] = 2.0 * number
        readers.add(JournalRead(number, "replay/forwarder.1.a/", "flows", 0, []), memory_short=False)
    while readers:
        readers.answer()
    assert [(each.id, each.error) for each in said] == [(0, "unavailable"), (1, "unavailable"), (2, ""), (3, "")]
    assert said[0].message == "the journal is slow, and others were first; ask again in a second"
    assert readers.refused == 2
