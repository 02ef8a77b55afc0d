import errno
import io
import os
import pty
import re
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from services.operator.client.journal_past import find_past, shown, tell_losses
from shared.capture.reader import CapturedDatagram, CaptureReader
from shared.journal.segments import SECOND
from shared.net.addresses import pack_address
from shared.process.lifecycle import OperatorError
from shared.settings.model import Settings
from tests.shared.journal.filled import AT, batch_of, identities, write_segment
from tests.stack import CHECKOUT, Stack


def fill(directory: Path, segments: int = 3, batches: int = 10) -> list[tuple[int, str, bytes]]:
    """Fill a journal of stream `flows`, a batch a second until now; return time, source and payload of all."""
    began_ns = time.time_ns() // 1000 * 1000 - segments * batches * SECOND
    put = []
    numbers = identities(rows=[4] * segments * batches)
    for segment in range(segments):
        some = []
        for at in range(segment * batches, (segment + 1) * batches):
            rows = [(f"10.0.{row}.1" if row < 3 else "2001:db8::1", 2055, b"%d %d" % (at, row)) for row in range(4)]
            some.append((numbers[at], batch_of(rows, began_ns + at * SECOND)))
            put += [(began_ns + at * SECOND, source, payload) for source, _, payload in rows]
        write_segment(directory / "flows", some, segment + 1, sealed=segment + 1 < segments)
    return put


def export(stack: Stack, *arguments: str) -> tuple[int, list[CapturedDatagram], str]:
    """Run `fanwire export` into a file; return its exit code, the datagrams, and what it said."""
    target = stack.directory / "exported.pcapng"
    target.unlink(missing_ok=True)
    code, _, said = stack.run("export", "--write", str(target), *arguments)
    return code, list(CaptureReader(io.BytesIO(target.read_bytes()))) if target.exists() else [], said


def test_a_part_of_the_past_as_a_capture(stack: Stack) -> None:
    """Exactly the datagrams of the span and the exporters come out, with times and addresses; no journal need run."""
    directory = stack.directory / "journal"
    put = fill(directory)
    stack.configure(f'[journal]\ndirectory = "{directory}"\n')
    code, found, said = export(stack, "--stream", "flows")
    assert (code, len(found)) == (0, 120)
    assert [(each.captured_ns, each.source, each.payload) for each in found] == [
        (at, pack_address(source), payload) for at, source, payload in put
    ]
    assert {each.destination for each in found} == {AT.four, AT.six}
    assert {each.port for each in found} == {AT.port}
    assert "120 datagrams of flows, from " in said

    since, until = put[40][0], put[60][0]
    begin, end = (datetime.fromtimestamp(at // 1000 / 1e6, UTC).isoformat() for at in (since, until))
    _, found, _ = export(stack, "--stream", "flows", "--from", begin, "--until", end, "--source", "10.0.1.0/24")
    assert [each.payload for each in found] == [
        payload for at, source, payload in put if since <= at < until and source == "10.0.1.1"
    ]
    assert len(found) == 5

    _, found, _ = export(stack, "--stream", "flows", "--from", "10.5s ago", "--source", "2001:db8::/64")
    assert 0 < len(found) <= 10
    assert [each.payload for each in found] == [each[2] for each in put[3::4]][-len(found) :]

    code, found, said = export(stack, "--stream", "flows", "--from", "1d ago", "--until", "2h ago")
    assert (code, found) == (0, [])
    assert "warning: there is no datagram of flows in this time" in said

    code, _, said = stack.run("export", "--stream", "flows", "--write", str(stack.directory / "exported.pcapng"))
    assert (code, "exists; name a new file" in said) == (73, True)
    command = [sys.executable, "-m", "services.operator", "export", "--stream", "flows"]
    piped = subprocess.run(command, env=stack.environment, cwd=CHECKOUT, capture_output=True, check=True).stdout
    assert [each.payload for each in CaptureReader(io.BytesIO(piped))] == [payload for *_, payload in put]


def test_what_can_not_be_exported(stack: Stack) -> None:
    """A stream, a time or a directory that is none is refused in one line that says what there is."""
    directory = stack.directory / "journal"
    fill(directory, 1)
    stack.configure(f'[journal]\ndirectory = "{directory}"\n')
    for arguments, code, words in (
        (("--stream", "flow"), 64, "the journal has nothing of 'flow' (did you mean 'flows'?); it keeps: flows"),
        (("--stream", "flows", "--from", "soon"), 64, "--from: 'soon' is no time; expected one such as 10m ago"),
        (("--stream", "flows", "--from", "now", "--until", "5m ago"), 64, "--from has to be before --until"),
        (
            ("--stream", "flows", "--directory", "/nowhere"),
            73,
            "no journal at /nowhere: No such file or directory; name it by --directory, and be its user or root",
        ),
        (("--stream", "flows", "--source", "10.0.0.1/8"), 64, "has host bits set"),
    ):
        found, _, said = export(stack, *arguments)
        assert found == code, said
        assert words in said
        assert len([line for line in said.splitlines() if not line.startswith("usage:") and line[0] != " "]) == 1
    (stack.directory / "empty").mkdir()
    assert (
        "it keeps nothing yet" in export(stack, "--stream", "flows", "--directory", str(stack.directory / "empty"))[2]
    )


def test_what_is_damaged_is_left_out_and_said(stack: Stack) -> None:
    """Bytes that have changed cost their batch; the exit code is 1 and the line says how much it was."""
    directory = stack.directory / "journal"
    fill(directory, 1)
    (path,) = (directory / "flows").iterdir()
    image = bytearray(path.read_bytes())
    at = image.index(b"3 1")
    image[at] ^= 1
    path.write_bytes(image)
    code, found, said = export(stack, "--stream", "flows", "--directory", str(directory))
    assert (code, len(found)) == (1, 36)
    assert "bytes of the journal are damaged: what was in them is left out" in said


def test_segments_that_can_not_be_opened_are_left_out_and_said(stack: Stack) -> None:
    """All others are written; the exit code is 1, and a line says how many are missing and why."""
    directory = stack.directory / "journal"
    put = fill(directory)
    second = sorted((directory / "flows").iterdir())[1]
    second.unlink()
    second.symlink_to(second.name)
    code, found, said = export(stack, "--stream", "flows", "--directory", str(directory))
    assert (code, [each.payload for each in found]) == (1, [payload for *_, payload in put[:40] + put[80:]])
    assert "segments that can't be read: 1 (Too many levels of symbolic links); they are left out" in said


def test_compressed_segments_are_left_out_and_said(stack: Stack) -> None:
    """All others are written; the exit code is 1, and a line says what to do about them."""
    directory = stack.directory / "journal"
    put = fill(directory)
    second = sorted((directory / "flows").iterdir())[1]
    second.rename(f"{second}.zst")
    code, found, said = export(stack, "--stream", "flows", "--directory", str(directory))
    assert (code, [each.payload for each in found]) == (1, [payload for *_, payload in put[:40] + put[80:]])
    assert "can't be read: 1 (compressed); they are left out; decompress them first, such as by `zstd -d`" in said


def test_directories_and_segments_may_be_on_another_disk(stack: Stack) -> None:
    """A directory that is a symbolic link, and a segment that is one, are read; links to nowhere do no harm."""
    directory, elsewhere = stack.directory / "journal", stack.directory / "elsewhere"
    put = fill(elsewhere)
    directory.mkdir()
    (directory / "flows").symlink_to(elsewhere / "flows")
    (directory / "loop").symlink_to("loop")
    (directory / "nowhere").symlink_to("gone")
    first = min((elsewhere / "flows").iterdir())
    first.rename(stack.directory / first.name)
    first.symlink_to(stack.directory / first.name)
    code, found, said = export(stack, "--stream", "flows", "--directory", str(directory))
    assert (code, len(found)) == (0, len(put)), said


def test_what_retention_takes_meanwhile_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Segments that are removed before they are read are left out; the exit code is 1, and a line says so."""
    fill(tmp_path, 1)
    (path,) = (tmp_path / "flows").iterdir()
    wanted = find_past(Namespace(stream="flows", since="", until="now", source=None, directory=tmp_path), Settings())
    path.unlink()
    assert list(wanted.batches()) == []
    assert tell_losses(wanted)
    assert "segments that were removed before they were read: 1; they are left out" in capsys.readouterr().err


def test_a_capture_is_not_for_a_terminal(stack: Stack) -> None:
    """On a terminal nothing binary is printed."""
    directory = stack.directory / "journal"
    fill(directory, 1)
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "services.operator", "export", "--stream", "flows", "--directory", str(directory)]
    done = subprocess.run(
        command, env=stack.environment, cwd=CHECKOUT, stdout=theirs, stderr=subprocess.PIPE, check=False
    )
    os.close(theirs)
    os.close(ours)
    assert done.returncode == 64
    assert b"a capture is not for a terminal" in done.stderr


def test_a_clock_that_was_set_back_is_no_past_that_ends_before_it_begins(stack: Stack) -> None:
    """The clock was an hour ahead: what is said of the time that an export has is its earliest and its latest."""
    directory, now_ns = stack.directory / "journal", time.time_ns()
    times = [now_ns - seconds * SECOND for seconds in (1000, 7200, 7100)]
    batches = [batch_of([("192.0.2.1", 1, b"one")], at) for at in times]
    write_segment(directory / "flows", zip(identities(rows=[1] * 3), batches, strict=True))
    code, found, said = export(stack, "--stream", "flows", "--directory", str(directory))
    assert (code, [each.captured_ns for each in found]) == (0, times)
    assert f"3 datagrams of flows, from {shown(times[1])} to {shown(times[0])}" in said


def test_what_others_keep_beside_streams_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Directories of others may be there, such as `lost+found`, which is root's: streams are found all the same.

    One of a stream in which this user may not look is told of.
    """
    put, iterdir = fill(tmp_path, 1), Path.iterdir
    fill(tmp_path / "notes", 1)
    for name in ("lost+found", "secret"):
        (tmp_path / name).mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "99991231T235959.999999999Z-000001.pcapng").touch()

    def listed(path: Path) -> Iterator[Path]:
        if path.name in ("lost+found", "secret"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return iterdir(path)

    monkeypatch.setattr(Path, "iterdir", listed)

    def found(stream: str) -> int:
        asked = Namespace(stream=stream, since="", until="now", source=None, directory=tmp_path)
        return sum(len(batch) for batch, _ in find_past(asked, Settings()).past.batches())

    assert found("flows") == len(put)
    for stream, words in (
        ("secret", f"no journal at {tmp_path}: Permission denied"),
        ("file", "the journal has nothing of 'file'; it keeps: flows"),
        ("notes", "the journal has nothing of 'notes'; it keeps: flows"),
        ("notes/flows", "the journal has nothing of 'notes/flows'"),
    ):
        with pytest.raises(OperatorError, match=re.escape(words)):
            found(stream)
