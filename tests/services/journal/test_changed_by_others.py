"""Other programs remove, compress and move what the journal has on the disk, while it runs."""

import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import datetime, tzinfo
from pathlib import Path
from typing import Self

import pytest

from services.journal import stream_journal
from services.journal.disk_thread import DiskThread, find_changed
from services.journal.readers import Readers
from services.journal.stream_journal import StreamJournal
from shared.bus.bodies.journal_messages import JournalPortion, JournalRead, Replayed
from shared.bus.messages import Body
from shared.datagrams.batch import DatagramBatch
from shared.journal import segments
from shared.journal.directory import Lock, segments_in
from shared.journal.retention import Kept
from shared.journal.segments import SECOND, Segment
from shared.ledger.counters import EXPIRED, KEPT_BYTES, SEGMENTS, WRITTEN
from shared.process.lifecycle import CANT_CREATE
from tests.builders import BusEnds, PlayedWorker, accounts_when, wait_wanted
from tests.services.journal.asking import PlayedReader
from tests.services.journal.test_service import ACCOUNT, datagrams, keep
from tests.shared.journal.filled import batch_of, identities
from tests.stack import Stack, wait_until


@pytest.fixture
def disk() -> Iterator[DiskThread]:
    """The thread that waits for the disk."""
    thread = DiskThread()
    yield thread
    assert thread.close()


@pytest.fixture
def journal(tmp_path: Path, disk: DiskThread, monkeypatch: pytest.MonkeyPatch) -> StreamJournal:
    """A journal that has written a datagram to each of five segments, the last of which is open."""
    monkeypatch.setattr(stream_journal, "SEGMENT_BYTES", 1)
    journal = StreamJournal("flows", tmp_path, 1 << 30, disk)
    journal.open()
    for identity in identities(rows=[1] * 5):
        if identity.sequence == 4:
            journal._segment_bytes = 1 << 20
        journal.append(identity, batch_of([("192.0.2.1", 1, b"one")]))
        journal.write()
    wait_until(lambda: _sealed(journal, disk) == 4, "four are sealed")
    return journal


def _sealed(journal: StreamJournal, disk: DiskThread) -> int:
    disk.collect()
    return sum(not each.busy for each in journal.kept())


def _numbers(journal: StreamJournal, disk: DiskThread) -> list[int]:
    journal.keep_up()
    disk.collect()
    return [each.number for each in journal.segments()]


def test_names_are_made_once_however_often_they_are_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To write a time costs most of a look at all segments, which follows each change of one."""
    made = Counter[int]()

    class Counted(datetime):
        @classmethod
        def fromtimestamp(cls, at: float, zone: tzinfo | None = None) -> Self:
            made[int(at)] += 1
            return super().fromtimestamp(at, zone)

    segments._time.cache_clear()
    monkeypatch.setattr(segments, "datetime", Counted)
    kept = [Kept(Segment("flows", number, (7_000_000 + number) * SECOND), 1, 0) for number in range(9)]
    for _ in range(2):
        assert find_changed(tmp_path, kept) == [(each, None) for each in kept]
    assert made == dict.fromkeys(range(7_000_000, 7_000_009), 1)


def test_what_others_remove_takes_no_room(journal: StreamJournal, disk: DiskThread) -> None:
    """Segments that somebody removes are counted at once, the present one too; those compressed, as large as they are.

    So nothing else has to go for them.
    """
    assert _numbers(journal, disk) == [1, 2, 3, 4, 5]
    _, two, three, _, five = sorted(journal.directory.iterdir())
    two.unlink()
    three.with_name(f"{three.name}.zst").write_bytes(bytes(10))
    three.unlink()
    wait_until(lambda: _numbers(journal, disk) == [1, 4, 5], "both are known to be gone")
    size = sum(each.stat().st_size for each in journal.directory.iterdir())
    told = journal.report()
    assert (told[SEGMENTS], told[KEPT_BYTES], told[EXPIRED]) == (4, size, 1)
    five.unlink()
    wait_until(lambda: _numbers(journal, disk) == [1, 4], "the present one is known to be gone")
    assert journal.report()[EXPIRED] == 2
    shutil.rmtree(journal.directory)
    wait_until(lambda: _numbers(journal, disk) == [], "all are")
    assert (journal.report()[KEPT_BYTES], journal.report()[EXPIRED]) == (0, 5)


def test_a_directory_that_is_made_anew_is_locked(stack: Stack) -> None:
    """Somebody removes the directory of a running journal: it makes it anew, goes on there, and no second one may."""
    directory = keep(stack)
    stack.start("broker")
    stack.start("journal")
    with BusEnds(stack.bus) as bus:
        worker = PlayedWorker(bus)
        wait_wanted(worker.publisher, "datagrams/messages/")
        worker.publish([b"one"])
        accounts_when(bus, "journal.1", lambda now: now[ACCOUNT].get(WRITTEN) == 1)
        shutil.rmtree(directory)
        now = accounts_when(bus, "journal.1", lambda now: now[ACCOUNT].get(EXPIRED) == 1)[ACCOUNT]
        assert now[KEPT_BYTES] == 0
        worker.publish([b"two"])
        accounts_when(bus, "journal.1", lambda now: now[ACCOUNT].get(WRITTEN) == 2)
        assert len(segments_in(directory, "messages")) == 1
        second = stack.start("journal.2", ready=False)
        assert second.process.wait(60) == CANT_CREATE
        assert f"another journal writes in {directory}: stop it first" in second.text
        batches, _ = PlayedReader(bus).ask()
        assert [rows for _, rows in batches] == [datagrams([b"two"])]


def test_a_directory_that_another_journal_has_made_is_its_own(stack: Stack) -> None:
    """The directory is moved away, and another journal is quicker to lock a new one: the first one ends with 73."""
    directory = keep(stack)
    stack.start("broker")
    journal = stack.start("journal")
    other = Lock(stack.directory / "other")
    directory.rename(stack.directory / "away")
    (stack.directory / "other").rename(directory)
    assert journal.process.wait(60) == CANT_CREATE
    assert f"another journal writes in {directory}: stop it first" in journal.text
    other.close()


def test_a_lock_follows_its_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock is that of the directory that has the name now, which is made where there is none."""
    directory = tmp_path / "journal"
    own = Lock(directory)
    moves: tuple[Callable[[], object], ...] = directory.exists, directory.rmdir, lambda: directory.rename("away")
    monkeypatch.chdir(tmp_path)
    for move in moves:
        move()
        own.hold()
        with pytest.raises(BlockingIOError):
            Lock(directory)
    own.close()
    Lock(directory).close()


DISK_OF_ITS_OWN = (
    "mkdir -p {at} {disk} && mount -t tmpfs -o size=8m fanwire {disk} && ln -s {disk} {at}/messages && "
    "exec {python} -m services.journal"
)


@pytest.mark.parametrize("sealed", [True, False])
def test_a_directory_is_given_the_new_name_of_its_stream(tmp_path: Path, disk: DiskThread, sealed: bool) -> None:
    """Its past is that of the new name; what workers count under that name has nothing to do with it."""
    batch = batch_of([("192.0.2.1", 1, b"one")])
    before = StreamJournal("flows", tmp_path, 1 << 30, disk)
    before.open()
    before.append(identities(rows=[1])[0], batch)
    before.write()
    if sealed:
        before.seal()
        wait_until(lambda: _sealed(before, disk), "it is sealed")
    (tmp_path / "flows").rename(tmp_path / "netflow")
    journal = StreamJournal("netflow", tmp_path, 1 << 30, disk)
    journal.open()
    assert journal.reached == {}
    said: list[tuple[Body, DatagramBatch | None]] = []
    readers = Readers(
        lambda _topic, body, batch=None: said.append((body, batch)) or True,  # type: ignore[func-returns-value]
        {"netflow": journal},
    )
    readers.add(JournalRead(1, "replay/forwarder.1.a/", "netflow", 0, []), memory_short=False)
    readers.answer()
    (replayed, came), (portion, _) = said
    assert isinstance(replayed, Replayed)
    assert replayed.stream == "netflow"
    assert came is not None
    assert list(came.datagrams()) == list(batch.datagrams())
    assert isinstance(portion, JournalPortion)
    assert portion.at_end
    before.seal()  # which was killed


def test_each_disk_has_room_for_others(stack: Stack) -> None:
    """A stream's directory is a link to another disk: `min_free` holds for that one, not where the link stands."""
    new = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "--map-root-user"]
    if subprocess.run([*new, "mount", "-t", "tmpfs", "none", "/mnt"], check=False, capture_output=True).returncode:
        pytest.skip("needs a mount namespace of its own")
    directory = keep(stack, "bytes = 16777216")
    settings = stack.directory / "fanwire.toml"
    settings.write_text(settings.read_text().replace("min_free = 0", "min_free = 4194304"))
    stack.start("broker")
    script = DISK_OF_ITS_OWN.format(at=directory, disk=stack.directory / "disk", python=sys.executable)
    journal = stack.spawn("journal", [*new, "sh", "-c", script], HONCHO_PROCESS_NAME="journal.1")
    wait_until(lambda: journal.events("ready"), lambda: f"it is ready: {journal.text}")
    with BusEnds(stack.bus) as bus:
        worker = PlayedWorker(bus)
        wait_wanted(worker.publisher, "datagrams/messages/")
        for number in range(300):
            worker.publish([b"%4d" % number * 250] * 20)
        accounts_when(bus, "journal.1", lambda now: now[ACCOUNT].get(WRITTEN) == 6000)
        now = accounts_when(
            bus, "journal.1", lambda now: now[ACCOUNT].get(EXPIRED, 0) > 0 and now[ACCOUNT][KEPT_BYTES] <= 4 << 20
        )[ACCOUNT]
        assert now[KEPT_BYTES] > 0
