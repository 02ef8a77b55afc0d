import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from shared.bus.kept_counts import HEADER, KeptFile, Sheet, read_sheet
from tests.builders import make_client
from tests.stack import CHECKOUT

ROOM = {"collector": ("sent", "held")}


def reopened(path: Path) -> Sheet:
    """Return what a successor finds."""
    kept = KeptFile(path)
    try:
        return kept.open()
    finally:
        kept.close()


def test_counts_are_there_for_the_successor(tmp_path: Path) -> None:
    """Counts are in the file as soon as they are stored, those without a place once they are kept again."""
    kept = KeptFile(tmp_path / "accounts")
    kept.open()
    account = kept.new_counts()
    account["sent"] += 3
    kept.keep([make_client("a")], {"collector/a": account}, ROOM)
    account["sent"] += 4
    account["held"] = -5
    assert not kept.stale
    account["dropped_eperm"] += 1
    assert bool(kept.stale)
    kept.close()
    assert reopened(tmp_path / "accounts") == Sheet([make_client("a")], {"collector/a": {"sent": 7, "held": -5}})


def test_a_sheet_takes_the_place_of_another_and_the_file_stays_small(tmp_path: Path) -> None:
    """Tables come and go: the newest are found, and counters that are kept no more change nothing."""
    path = tmp_path / "accounts"
    kept = KeptFile(path)
    kept.open()
    before = kept.new_counts()
    for number in range(200):
        account = kept.new_counts()
        tables = {f"collector/{name}": account for name in range(number % 7)} | {"collector/a": account}
        kept.keep([], tables, ROOM)
        account["sent"] = number
        before["sent"] = 1 << 40
        before = account
    kept.close()
    assert reopened(path).tables["collector/a"] == {"sent": 199}
    assert path.stat().st_size < 4096


def test_counts_outlive_sigkill(tmp_path: Path) -> None:
    """Every count that was stored before a SIGKILL is in the file."""
    code = (
        "import os, signal, sys, pathlib\n"
        "from shared.bus.kept_counts import KeptFile\n"
        "kept = KeptFile(pathlib.Path(sys.argv[1]))\n"
        "kept.open()\n"
        "counts = kept.new_counts()\n"
        "kept.keep([], {'a/': counts}, {'a': ('n',)})\n"
        "for counts['n'] in range(100_000):\n"
        "    pass\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "accounts")], cwd=CHECKOUT, check=False)
    assert done.returncode == -signal.SIGKILL
    assert reopened(tmp_path / "accounts").tables == {"a/": {"n": 99_999}}


def test_a_file_that_another_process_has_is_left_alone(tmp_path: Path) -> None:
    """A second process of one kind is told so, and leaves the file as it is."""
    first, second = KeptFile(tmp_path / "accounts"), KeptFile(tmp_path / "accounts")
    first.open()
    first.keep([], {"a/": first.new_counts({"n": 2})}, {})
    with pytest.raises(BlockingIOError):
        second.open()
    first.close()
    assert reopened(tmp_path / "accounts").tables == {"a/": {"n": 2}}


def test_a_file_that_others_remove_is_made_anew(tmp_path: Path) -> None:
    """Counts are in a new file within the next look, also where their directory is gone for a while."""
    path = tmp_path / "bus" / "accounts"
    path.parent.mkdir()
    kept = KeptFile(path)
    kept.open()
    counts = kept.new_counts({"n": 2})
    kept.keep([], {"a/": counts}, {})
    assert not kept.renew()
    path.unlink()
    path.parent.rmdir()
    assert not kept.renew()
    counts["n"] += 1
    path.parent.mkdir()
    with capture_logs() as logs:
        assert kept.renew()
    assert logs[0]["event"] == "another program has removed the file of accounts: it was made anew"
    assert kept.suspended
    kept.keep([], {"a/": counts}, {})
    counts["n"] += 1
    kept.close()
    assert reopened(path).tables == {"a/": {"n": 4}}


def test_a_file_of_another_kind_is_begun_anew(tmp_path: Path) -> None:
    """Anything that is no file of this version is replaced by the first sheet."""
    path = tmp_path / "accounts"
    for content, reason in ((b"x" * 5000, "damaged"), (b"fanwire1" + bytes(5000), "of another version of fanwire")):
        path.write_bytes(content)
        kept = KeptFile(path)
        with capture_logs() as logs:
            assert kept.open() == Sheet()
        assert logs[0]["event"] == "accounts begin anew, since their file can't be read"
        assert logs[0]["reason"] == reason
        kept.close()
    kept.open()
    counts = kept.new_counts({"n": 2})
    kept.keep([], {"a/": counts}, {})
    kept.close()
    assert reopened(path).tables == {"a/": {"n": 2}}


def test_a_full_disk_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counting goes on where the disk has no room for more; one line says so, and no successor finds an old account."""
    path = tmp_path / "accounts"
    kept = KeptFile(path)
    kept.open()
    counts = kept.new_counts({"n": 2})
    kept.keep([], {"a/": counts}, {})
    monkeypatch.setattr(os, "posix_fallocate", Mock(side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
    with capture_logs() as logs:
        kept.keep([], {"a/": counts, **{f"b/{number}": kept.new_counts({"n": 1}) for number in range(1000)}}, {})
    assert "accounts end with this process: their file can't be used" in logs[0]["event"]
    assert (logs[0]["error"], kept.stale) == ("No space left on device", False)
    counts["n"] += 1
    assert counts["n"] == 3
    monkeypatch.undo()
    assert reopened(path) == Sheet()


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_are_refused_or_read(tmp_path: Path, data: st.DataObject) -> None:
    """No content of a file does more than raise ValueError or MsgspecError."""
    path = tmp_path / "accounts"
    path.unlink(missing_ok=True)
    kept = KeptFile(path)
    kept.open()
    kept.keep([make_client("a")], {"collector/a": kept.new_counts({"sent": 1})}, ROOM)
    kept.close()
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(st.integers(0, len(content) - 1) | st.integers(0, 2 * HEADER))
        content[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(content)))
    for damaged in (bytes(content), bytes(content[:cut]), data.draw(st.binary(max_size=64))):
        try:
            sheet, (begin, end) = read_sheet(damaged)
        except (ValueError, msgspec.MsgspecError):
            continue
        assert HEADER <= begin <= end <= len(damaged)
        assert all(isinstance(count, int) for table in sheet.tables.values() for count in table.values())
