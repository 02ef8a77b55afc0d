import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from itertools import product
from pathlib import Path

import pytest

from services.journal.service import FILL_ROWS, FILL_SECONDS, JournalService, fill_seconds
from shared.bus.bodies.journal_messages import WorkerPosition
from shared.bus.endpoint import queue_limit
from shared.capture.reader import CaptureReader
from shared.journal.directory import segments_in
from shared.ledger.counters import EXPIRED, KEPT_BYTES, SEGMENTS, SET_ASIDE, TAKEN, UNSERVED, WRITE_ERRNO, WRITTEN
from shared.process.lifecycle import CANT_CREATE
from shared.settings.entries import Stream
from shared.settings.file import load
from shared.settings.model import Settings
from shared.settings.tables import Bus, Journal
from tests.builders import SOURCES, BusEnds, PlayedWorker, accounts_when, make_batch, wait_unwanted, wait_wanted
from tests.documents import block
from tests.services.journal.asking import PlayedReader
from tests.stack import CHECKOUT, DRAIN_SECONDS, Stack, wait_until

KEPT = """
[journal]
directory = "{directory}"
min_free = 0
sync_seconds = 0.05
{more}
[[stream]]
name = "messages"
listen = ["udp://127.0.0.1:6667"]
journal = true
[[stream]]
name = "others"
listen = ["udp://127.0.0.1:6668"]
"""
ACCOUNT = "journal/messages"


def test_the_readme_keeps_a_stream(tmp_path: Path) -> None:
    """The settings that the README shows name a stream that the journal keeps."""
    (tmp_path / "fanwire.toml").write_text(block("services/journal/README.md", "keep"))
    assert load(tmp_path / "fanwire.toml").journaled == ("netflow",)


def keep(stack: Stack, more: str = "", directory: Path | None = None) -> Path:
    """Configure a stack whose journal keeps stream `messages`; return the journal's directory."""
    directory = directory or stack.directory / "journal"
    stack.configure(KEPT.format(directory=directory, more=more))
    return directory


def test_what_gathers_is_a_small_part_of_a_queue() -> None:
    """Messages gather for a short time, and at high rates for less: the queue has room for when the journal is late."""
    settings = Settings()
    queue = queue_limit(settings.bus.high_water_mark, settings.journal.memory)
    assert f"holds {queue} batches" in (CHECKOUT / "services/journal/README.md").read_text()
    for rate, rows in product((100, 300, 1000, 10_000, 100_000), (1, 100, 700)):
        came = 8
        filled = fill_seconds(came, came * rows, came / rate)
        assert 1 < rate * filled <= queue / 8
        assert filled <= FILL_SECONDS
        assert rate * rows * filled <= max(FILL_ROWS, rows) * 1.001
    assert fill_seconds(1, 1, 0.01) == FILL_SECONDS
    assert fill_seconds(1, 1, 0.002, 0.01) == 0.01


@pytest.mark.parametrize(("came", "period"), [(0, 0.03), (1, 0.04), (2, 1.0), (32, 0.01), (256, 0.01)])
def test_no_messages_gather_that_would_not(came: int, period: float) -> None:
    """The next message wakes the journal where hardly another one comes in time, and where it has been late."""
    assert fill_seconds(came, came, period) == 0


def datagrams(payloads: list[bytes]) -> list[tuple[str, int, bytes]]:
    """Return what has to come back of a batch of a played worker."""
    return list(make_batch(payloads, SOURCES).datagrams())


def test_it_keeps_what_comes_and_gives_it_back(stack: Stack) -> None:
    """Every batch comes back with its worker's numbers, from any position on, also after the journal was away."""
    directory = keep(stack)
    stack.start("broker")
    journal = stack.start("journal")
    assert journal.events("ready")[0]["streams"] == ["messages"]
    sent = [[b"%d %d" % (number, row) for row in range(number % 4 + 1)] for number in range(100)]
    with BusEnds(stack.bus) as bus:
        worker = PlayedWorker(bus)
        wait_wanted(worker.publisher, "datagrams/messages/")
        assert not worker.publisher.wanted("datagrams/others/")
        worker.publish([])
        for payloads in sent[:60]:
            worker.publish(payloads)
        accounts_when(bus, "journal.1", lambda now: now[ACCOUNT].get(WRITTEN) == sum(map(len, sent[:60])))
        reader = PlayedReader(bus)
        batches, portion = reader.ask(rows=50)
        assert sum(len(rows) for _, rows in batches) in range(47, 51)
        assert not portion.at_end
        more, portion = reader.ask(*portion.positions)
        assert portion.at_end
        assert [rows for _, rows in batches + more] == [datagrams(payloads) for payloads in sent[:60]]
        numbers = [(body.worker, body.boot, body.sequence, body.total) for body, _ in batches + more]
        totals = [sum(map(len, sent[:at])) for at in range(60)]
        boot = worker.publisher.boot
        assert numbers == [("ingest.1", boot, at, total) for at, total in zip(range(1, 61), totals, strict=True)]
        assert (portion.expired, portion.missing, portion.error) == (0, 0, "")
        assert reader.ask(*portion.positions)[0] == []

        _, refused = PlayedReader(bus, "transmitter.1", "nothing").ask()
        assert (refused.error, "does not keep stream nothing" in refused.message) == ("unknown_stream", True)

        assert journal.stop() == 0
        assert [segment.is_open for segment in segments_in(directory, "messages")] == [False]
        for payloads in sent[60:70]:
            worker.lose(len(payloads))
        stack.start("journal")
        wait_wanted(worker.publisher, "datagrams/messages/")
        for payloads in sent[70:]:
            worker.publish(payloads)
        away = sum(map(len, sent[60:70]))
        accounts = accounts_when(bus, "journal.1", lambda now: now[ACCOUNT].get(WRITTEN) == sum(map(len, sent[70:])))
        assert accounts[f"origin/ingest.1/{boot:x}/messages"][UNSERVED] == away
        last, portion = reader.ask(*portion.positions)
        assert [rows for _, rows in last] == [datagrams(payloads) for payloads in sent[70:]]
        assert (portion.missing, portion.at_end) == (away, True)
    plain = []
    for path in sorted(directory.rglob("*.pcapng")):
        with path.open("rb") as file:
            plain += [each.payload for each in CaptureReader(file)]
    assert plain == [payload for payloads in sent[:60] + sent[70:] for payload in payloads]


def test_a_killed_journal_has_lost_nothing_that_was_written(stack: Stack) -> None:
    """After SIGKILL the next start finds all batches; half a one at the end is cut off, and the log says so."""
    directory = keep(stack)
    stack.start("broker")
    journal = stack.start("journal")
    with BusEnds(stack.bus) as bus:
        worker = PlayedWorker(bus)
        wait_wanted(worker.publisher, "datagrams/messages/")
        for number in range(50):
            worker.publish([b"%d" % number])
        accounts_when(bus, "journal.1", lambda now: now[ACCOUNT][WRITTEN] == 50)
        journal.stop(signal.SIGKILL)
        (segment,) = segments_in(directory, "messages")
        assert segment.is_open
        path = directory / "messages" / segment.name
        os.truncate(path, path.stat().st_size - 3)
        journal = stack.start("journal")
        assert journal.events("a segment was not whole: its end was cut off")
        batches, portion = PlayedReader(bus).ask()
        assert [rows for _, rows in batches] == [datagrams([b"%d" % number]) for number in range(49)]
        assert portion.at_end


def test_only_one_journal_writes_in_a_directory(stack: Stack) -> None:
    """A second journal ends with 73, and one line that says what to do."""
    directory = keep(stack)
    stack.start("broker")
    stack.start("journal")
    second = stack.start("journal.2", ready=False)
    assert second.process.wait(60) == CANT_CREATE
    assert f"another journal writes in {directory}: stop it first" in second.text


def test_a_reload_begins_and_ends_to_keep_a_stream(stack: Stack) -> None:
    """A journal without a stream to keep waits; by SIGHUP it gets one, and loses it again but not what is there."""
    directory = keep(stack)
    settings = stack.directory / "fanwire.toml"
    kept = settings.read_text()
    settings.write_text(kept.replace("journal = true", ""))
    stack.start("broker")
    journal = stack.start("journal")
    assert not directory.exists()
    with BusEnds(stack.bus) as bus:
        worker = PlayedWorker(bus)
        settings.write_text(kept)
        assert journal.reload()["event"] == "reloaded"
        wait_wanted(worker.publisher, "datagrams/messages/")
        worker.publish([b"one"])
        accounts_when(bus, "journal.1", lambda now: now.get(ACCOUNT, {}).get(WRITTEN) == 1)
        settings.write_text(kept.replace("journal = true", ""))
        assert journal.reload()["event"] == "reloaded"
        accounts_when(bus, "journal.1", lambda now: now[ACCOUNT][SEGMENTS] == 1)
        batches, _ = PlayedReader(bus).ask()
        assert [rows for _, rows in batches] == [datagrams([b"one"])]
        shutil.rmtree(directory)
        directory.touch()
        assert f"{directory}: Not a directory; set [journal] directory" in journal.reload()["event"]


def test_what_is_beside_streams_is_let_alone(stack: Stack) -> None:
    """Files and directories of others are in the journal's directory, also such as seem to be segments: they stay."""
    directory = keep(stack, "age_seconds = 1")
    foreign = directory / "netflow of 2019", directory / os.fsdecode(b"netflow\xff")
    for each in foreign:
        each.mkdir(parents=True)
        (each / "20190101T000000.000000000Z-000001.pcapng").write_bytes(bytes(1000))
    (directory / "messages").mkdir()
    for name in ("99991231T235959.999999999Z-000001.pcapng", "00010101T000000.000000000Z-000002.pcapng", "notes.txt"):
        (directory / "messages" / name).write_bytes(bytes(1000))
    stack.start("broker")
    stack.start("journal")
    with BusEnds(stack.bus) as bus:
        worker = PlayedWorker(bus)
        wait_wanted(worker.publisher, "datagrams/messages/")
        worker.publish([b"one"])
        now = accounts_when(bus, "journal.1", lambda now: now[ACCOUNT].get(WRITTEN) == 1)
        assert now[ACCOUNT][SEGMENTS] == 1
        assert [name for name in now if name.startswith("journal/")] == [ACCOUNT]
        batches, _ = PlayedReader(bus).ask()
        assert [rows for _, rows in batches] == [datagrams([b"one"])]
    assert all(len([*each.iterdir()]) == 1 for each in foreign)


def test_a_slow_disk_is_waited_for_asleep(tmp_path: Path) -> None:
    """While the disk syncs nothing is due for that, though more has come since: the loop would spin."""
    kept = Stream(name="messages", listen=("udp://127.0.0.1:6667",), journal=True)
    own = Journal(directory=str(tmp_path / "journal"))
    settings = Settings(bus=Bus(directory=str(tmp_path)), journal=own, streams=(kept,))
    with JournalService("journal.1", settings) as journal:
        journal._upkeep_at = journal._reporter.due_at = 100.0
        stream = journal._streams["messages"]
        stream.unsynced, journal._sync_at = True, 7.0
        assert journal._due_at == 7.0
        journal._syncing = True
        assert journal._due_at == 100.0


def test_a_directory_that_cannot_be_made(stack: Stack) -> None:
    """The start, and --check before it, say in one line which directory can't be used and what to do."""
    (stack.directory / "file").touch()
    directory = keep(stack, directory=stack.directory / "file" / "journal")
    assert stack.start("journal", ready=False).process.wait(60) == CANT_CREATE
    assert re.search(rf"{directory}: Not a directory; set \[journal\] directory", stack["journal"].text)
    checked = stack.start("journal", "--check", ready=False)
    assert checked.process.wait(60) == 78
    assert f"{directory}: no files can be made there; set [journal] directory" in checked.text


SMALL_DISK = "mkdir -p {at} && mount -t tmpfs -o size={size} fanwire {at} && exec {python} -m services.journal"


def test_a_full_disk_stops_nothing_but_the_journal(stack: Stack) -> None:
    """While its disk is full the journal says so and counts; it goes on by itself once there is room."""
    new = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "--map-root-user"]
    if subprocess.run([*new, "mount", "-t", "tmpfs", "none", "/mnt"], check=False, capture_output=True).returncode:
        pytest.skip("needs a mount namespace of its own")
    directory = keep(stack, "bytes = 1048576")
    stack.start("broker")
    script = SMALL_DISK.format(at=directory, size="4m", python=sys.executable)
    journal = stack.spawn("journal", [*new, "sh", "-c", script], HONCHO_PROCESS_NAME="journal.1")
    wait_until(lambda: journal.events("ready"), lambda: f"it is ready: {journal.text}")
    inside = Path(f"/proc/{journal.process.pid}/root{directory}")
    with BusEnds(stack.bus) as bus:
        worker = PlayedWorker(bus)
        wait_wanted(worker.publisher, "datagrams/messages/")
        worker.publish([b"before"])
        accounts_when(bus, "journal.1", lambda now: now[ACCOUNT][WRITTEN] == 1)
        with (inside / "others").open("wb", buffering=0) as file, suppress(OSError):
            while file.write(bytes(4096)):
                pass
        for _ in range(50):
            worker.publish([bytes(1000)] * 20)
        now = accounts_when(bus, "journal.1", lambda now: now[ACCOUNT][TAKEN] == 1001)[ACCOUNT]
        assert now[WRITTEN] + now["dropped_disk_full"] == 1001
        assert now["dropped_disk_full"] > 0
        assert now[WRITE_ERRNO] == 28
        (said, *_) = journal.events("the journal can't write: datagrams come to collectors as ever, and are not kept")
        assert said["cure"] == "free some of the disk, or lower [journal] bytes"
        (inside / "others").unlink()

        def goes_on() -> bool:
            worker.publish([b"after"])
            return bool(journal.events("the journal writes again"))

        wait_until(goes_on, "it writes again")
        now = accounts_when(bus, "journal.1", lambda now: not now[ACCOUNT][WRITE_ERRNO])[ACCOUNT]
        batches, _ = PlayedReader(bus).ask()
        assert batches[0][1] == datagrams([b"before"])
        assert batches[-1][1] == datagrams([b"after"])
        assert sum(len(rows) for _, rows in batches) <= now[WRITTEN]


def test_retention_removes_whole_segments(stack: Stack) -> None:
    """Over its bytes the oldest segments go, what was in them is counted, and a reader hears how much it missed."""
    directory = keep(stack, "bytes = 1048576")
    stack.start("broker")
    stack.start("journal")
    with BusEnds(stack.bus) as bus:
        worker = PlayedWorker(bus)
        wait_wanted(worker.publisher, "datagrams/messages/")
        for number in range(200):
            worker.publish([b"%4d" % number * 250] * 20)
        accounts_when(bus, "journal.1", lambda now: now[ACCOUNT][TAKEN] == 4000 and now[ACCOUNT][KEPT_BYTES] <= 1 << 20)
        reader, found, expired = PlayedReader(bus), 0, 0
        positions = [WorkerPosition("ingest.1", worker.publisher.boot, 0, 0)]
        while positions:
            batches, portion = reader.ask(*positions)
            found += sum(len(rows) for _, rows in batches)
            expired += portion.expired
            assert portion.missing == 0
            positions = [] if portion.at_end else portion.positions
        assert found + expired == 4000
        assert 0 < found <= (1 << 20) // 1000
        accounts_when(bus, "journal.1", lambda now: now[ACCOUNT].get(EXPIRED) == expired)
        assert sum(path.stat().st_size for path in directory.rglob("*.pcapng")) <= 1 << 20


def test_a_segment_that_becomes_unreadable_is_set_aside(stack: Stack) -> None:
    """A sealed segment full of rubbish is set aside by the first reader, who gets what is in the others."""
    directory = keep(stack)
    stack.start("broker")
    with BusEnds(stack.bus) as bus:
        worker = PlayedWorker(bus)
        for text in (b"one", b"two"):
            journal = stack.start("journal")
            wait_wanted(worker.publisher, "datagrams/messages/")
            worker.publish([text])
            accounts_when(bus, "journal.1", lambda now: now[ACCOUNT].get(WRITTEN) == 1)
            assert journal.stop() == 0
            wait_unwanted(worker.publisher, "datagrams/messages/")
        first, _ = segments_in(directory, "messages")
        (directory / "messages" / first.name).write_bytes(os.urandom(5000))
        journal = stack.start("journal")
        batches, portion = PlayedReader(bus).ask()
        assert [rows for _, rows in batches] == [datagrams([b"two"])]
        assert portion.at_end
        journal.wait_for("nothing can be read in a segment: it is set aside")
        assert (directory / "messages" / f"{first.name}.bad").exists()
        accounts_when(bus, "journal.1", lambda now: now[ACCOUNT].get(SET_ASIDE) == 1)


def test_it_ends_in_time_and_takes_what_still_comes(stack: Stack) -> None:
    """A journal that is told to end has written everything by then, within the time of a drain."""
    directory = keep(stack)
    stack.start("broker")
    journal = stack.start("journal")
    with BusEnds(stack.bus) as bus:
        worker = PlayedWorker(bus)
        wait_wanted(worker.publisher, "datagrams/messages/")
        for _ in range(100):
            worker.publish([bytes(1000)] * 100)
        assert journal.stop(seconds=DRAIN_SECONDS) == 0
    assert journal.events("drained")[0]["accounts"]["messages"][WRITTEN] == 10_000
    assert [segment.is_open for segment in segments_in(directory, "messages")] == [False]
