"""A power cut, by simulation: a file that ends anywhere, bytes that have changed, segments that are gone."""

import errno
import os
import random
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shared.bus.bodies.journal_messages import WorkerPosition
from shared.capture.pcapng import make_option
from shared.capture.reader import CaptureReader
from shared.datagrams.batch import DatagramBatch
from shared.journal.directory import Lock, Recovered, recover, segments_in, streams_in
from shared.journal.reading import PastBatches
from shared.journal.records import MAGIC, Identity, Reached
from shared.journal.segment_writer import SegmentWriter, header
from shared.journal.segments import Segment
from tests.shared.journal.filled import (
    AT,
    NOW,
    Written,
    as_written,
    batch_of,
    identities,
    read_all,
    times,
    write_segment,
)

Batches = list[tuple[Identity, DatagramBatch]]


def some_batches(count: int, rows: int = 3, worker: str = "ingest.1", boot: int = 9) -> Batches:
    """Return batches of short datagrams, each row different."""
    made = []
    for identity, at_ns in zip(identities(worker, boot, rows=[rows] * count), times(count), strict=True):
        datagrams = [
            (f"192.0.2.{row % 250}", row, f"{worker} {identity.sequence} {row}".encode() * (row % 4 + 1))
            for row in range(rows)
        ]
        made.append((identity, batch_of(datagrams, at_ns)))
    return made


def written(batches: Batches) -> list[Written]:
    """Return what has to come back of them."""
    return [as_written(*each) for each in batches]


def recovered(directory: Path) -> list[Recovered]:
    """Start as a journal does, on the directory above the stream's."""
    lock = Lock(directory.parent)
    try:
        return [each for stream in streams_in(directory.parent) for each in recover(directory.parent, stream)]
    finally:
        lock.close()


def test_a_file_cut_at_every_byte_of_a_batch(tmp_path: Path) -> None:
    """Wherever a power cut ends the file, the start cuts off what is not whole, and all whole batches are served."""
    directory = tmp_path / "flows"
    batches = some_batches(3)
    segment = write_segment(directory, batches, sealed=False)
    path = directory / segment.name
    whole = path.read_bytes()
    ends = [end for _, end in _bounds(directory, batches, segment.began_ns)]
    for size in range(len(whole) + 1):
        for each in directory.iterdir():
            each.unlink()
        path.write_bytes(whole[:size])
        kept = sum(end <= size for end in ends)
        (found,) = recovered(directory)
        assert found.left == segment
        assert read_all(directory)[0] == written(batches[:kept]), size
        if kept:
            assert found.cut == size - ends[kept - 1]
            assert found.now == Segment("flows", 1, segment.began_ns)
            with (directory / found.now.name).open("rb") as file:
                reader = CaptureReader(file)
                assert len(list(reader)) == 3 * kept
                assert not reader.damaged
            assert found.reached == {"ingest.1": Reached(9, 3 * kept)}
        else:
            assert found.now is None or found.now.is_bad
            assert not segments_in(tmp_path, "flows")


@given(data=st.data(), count=st.integers(1, 6))
def test_random_bytes_changed_anywhere(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, count: int
) -> None:
    """Flips, zeroed pages and inserted rubbish cost the batches they are in, and no other; nothing wrong is served."""
    directory = tmp_path_factory.mktemp("changed") / "flows"
    batches = some_batches(12, rows=data.draw(st.integers(1, 40)))
    segment = write_segment(directory, batches, sealed=data.draw(st.booleans()))
    path = directory / segment.name
    image = bytearray(path.read_bytes())
    untouched = set(range(12))
    bounds = _bounds(directory, batches, segment.began_ns)
    for _ in range(count):
        at, size = data.draw(st.integers(0, len(image) - 1)), data.draw(st.sampled_from([1, 1, 4, 512]))
        size = min(size, len(image) - at)
        kind = data.draw(st.sampled_from(["flip", "zero", "random"]))
        if kind == "flip":
            image[at] ^= 1 << data.draw(st.integers(0, 7))
            size = 1
        else:
            image[at : at + size] = bytes(size) if kind == "zero" else random.Random(at).randbytes(size)
        untouched -= {number for number, (start, end) in enumerate(bounds) if start < at + size and at < end}
    path.write_bytes(image)
    recovered(directory)
    found, portion = read_all(directory, WorkerPosition("ingest.1", 9, 0, 0))
    expected = written(batches)
    assert [each for each in expected if each[0].sequence in untouched] == [
        each for each in found if each[0].sequence in untouched
    ]
    assert all(each in expected for each in found)
    assert [each[0].sequence for each in found] == sorted({each[0].sequence for each in found})
    last = found[-1][0].total + len(found[-1][2]) if found else 0
    assert sum(len(rows) for *_, rows in found) + portion.missing + portion.expired == last


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize("size", [0, 12, 80, 256, 2**16])
def test_a_header_of_another_size_costs_no_batch(tmp_path: Path, size: int, sealed: bool) -> None:
    """All batches are served where the first block tells a size that leads into one of them, or anywhere."""
    directory = tmp_path / "flows"
    batches = some_batches(12, rows=1)
    path = directory / write_segment(directory, batches, sealed=sealed).name
    image = bytearray(path.read_bytes())
    image[4:8] = size.to_bytes(4, "little")
    path.write_bytes(image)
    recovered(directory)
    assert read_all(directory)[0] == written(batches)


pieces = st.sampled_from([
    *(MAGIC, header("flows"), bytes(16), b"\6\0\0\0" + bytes(24), b"\6\0\0\0\x10\0\0\0", b"\xff" * 40),
    make_option(2989, MAGIC * 9),
])  # fmt: skip


@given(st.lists(pieces | st.binary(max_size=80), max_size=12).map(b"".join), st.booleans())
@example(b"\6" + bytes(3), True)
@example(header("flows") + b"\6" + bytes(40), True)
def test_no_bytes_do_any_harm(tmp_path_factory: pytest.TempPathFactory, image: bytes, is_open: bool) -> None:
    """A segment may hold any bytes: a start and a reader go on, and nothing is read out of them."""
    directory = tmp_path_factory.mktemp("any") / "flows"
    directory.mkdir()
    segment = Segment("flows", 1, NOW, is_open)
    (directory / segment.name).write_bytes(image)
    found, portion = read_all(directory)
    assert (found, portion.at_end) == ([], True)
    recovered(directory)
    assert read_all(directory)[0] == []


def _bounds(directory: Path, batches: Batches, began_ns: int) -> list[tuple[int, int]]:
    """Return where each batch begins and ends in a segment."""
    writer = SegmentWriter(directory, Segment("flows", 999, began_ns, is_open=True), AT)
    bounds = []
    for identity, batch in batches:
        start = writer.size
        writer.append([(identity, batch)])
        bounds.append((start, writer.size))
    (directory / writer.seal().name).unlink()
    return bounds


@given(gone=st.sets(st.integers(0, 5)))
def test_segments_that_are_gone(tmp_path_factory: pytest.TempPathFactory, gone: set[int]) -> None:
    """Without some of its segments a stream is served all the same, and what they had counts as missing or expired."""
    directory = tmp_path_factory.mktemp("gone") / "flows"
    batches = some_batches(12)
    names = [write_segment(directory, batches[2 * at : 2 * at + 2], at + 1).name for at in range(6)]
    for at in gone:
        (directory / names[at]).unlink()
    found, portion = read_all(directory, WorkerPosition("ingest.1", 9, 0, 0))
    assert found == written([each for at, each in enumerate(batches) if at // 2 not in gone])
    kept = [at for at in range(6) if at not in gone]
    assert portion.expired == 6 * (kept[0] if kept else 0)
    assert portion.missing == sum(6 for at in gone if kept and kept[0] < at < kept[-1])


def test_a_datagram_that_looks_like_a_record(tmp_path: Path) -> None:
    """A payload that holds a whole record is a payload; behind damage too, for it can't know when a segment began."""
    directory = tmp_path / "flows"
    identity, batch = some_batches(1, worker="ingest.7")[0]
    segment = write_segment(directory, [(identity, batch_of(list(batch.datagrams()), NOW + 1))])
    forged = (directory / segment.name).read_bytes()
    (directory / segment.name).unlink()
    first, second = identities(rows=[1, 1])
    outer = [(first, batch_of([("192.0.2.1", 1, forged)])), (second, batch_of([("192.0.2.1", 2, b"last")]))]
    segment = write_segment(directory, outer)
    assert read_all(directory)[0] == written(outer)
    image = bytearray((directory / segment.name).read_bytes())
    image[len(header("flows"))] ^= 1  # the type of the first block: the record is found by its identity
    (directory / segment.name).write_bytes(image)
    assert read_all(directory)[0] == written(outer)


def test_a_file_of_another_program_stays(tmp_path: Path) -> None:
    """Files whose names are none of a segment are neither read nor touched."""
    directory = tmp_path / "flows"
    write_segment(directory, some_batches(1))
    for name in ("notes.txt", "20261128T173000.000000007Z-1.pcapng.gz", "20269928T173000.000000007Z-1.pcapng"):
        (directory / name).write_text("mine")
    assert recovered(directory) == []
    assert len(segments_in(tmp_path, "flows")) == 1
    assert (directory / "notes.txt").read_text() == "mine"


def test_a_stale_block_of_another_segment(tmp_path: Path) -> None:
    """Records of an older segment, left on the disk where a new one was torn, are not taken for its own."""
    directory = tmp_path / "flows"
    old = write_segment(directory, some_batches(4))
    new = some_batches(2, boot=10)
    new = [(identity, batch_of(list(batch.datagrams()), NOW + 10**12)) for identity, batch in new]
    segment = write_segment(directory, new, 2, sealed=False)
    stale = (directory / old.name).read_bytes()
    with (directory / segment.name).open("ab") as file:
        file.write(stale[len(header("flows")) :])
    (directory / old.name).unlink()
    (found,) = recovered(directory)
    assert found.cut == len(stale) - len(header("flows"))
    assert read_all(directory)[0] == written(new)


def test_only_one_journal_has_a_directory(tmp_path: Path) -> None:
    """A second lock is refused until the first is given back."""
    first = Lock(tmp_path / "journal")
    with pytest.raises(BlockingIOError):
        Lock(tmp_path / "journal")
    first.close()
    Lock(tmp_path / "journal").close()


def test_what_holds_no_record_is_set_aside(tmp_path: Path) -> None:
    """A segment left open with nothing but rubbish in it ends in .bad; an empty one is removed."""
    directory = tmp_path / "flows"
    segment = write_segment(directory, some_batches(1), sealed=False)
    (directory / segment.name).write_bytes(os.urandom(9000))
    empty = Segment("flows", 2, NOW, is_open=True)
    (directory / empty.name).write_bytes(header("flows"))
    found = recovered(directory)
    assert [(each.left.number, each.cut) for each in found] == [(1, 9000), (2, 0)]
    assert [each.name for each in directory.iterdir()] == [segment.name + ".bad"]
    assert segments_in(tmp_path, "flows") == []
    assert [each.is_bad for each in segments_in(tmp_path, "flows", unreadable=True)] == [True]


@pytest.mark.parametrize("sealed", [True, False])
def test_a_bad_sector_costs_what_is_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sealed: bool) -> None:
    """The disk can't read a part of a segment: the batches in it are left out as damaged, and all others are read."""
    directory, batches = tmp_path / "flows", some_batches(100, rows=9)
    segment = write_segment(directory, batches, sealed=sealed)
    bad, pread = range(20_000, 20_512), os.pread

    def read_but_there(descriptor: int, size: int, offset: int) -> bytes:
        if offset < bad.stop and bad.start < offset + size:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return pread(descriptor, size, offset)

    whole = written(batches)
    monkeypatch.setattr(os, "pread", read_but_there)
    if not sealed:
        assert [(each.left, each.cut) for each in recovered(directory)] == [(segment, 0)]
    found, portion = read_all(directory)
    lost = [each for each in whole if each not in found]
    assert found == [each for each in whole if each not in lost]
    assert 0 < len(lost) < 20
    assert portion.damaged > 0
    past = PastBatches(directory, segments_in(tmp_path, "flows"), 0, 1 << 62)
    assert len(list(past.batches())) == len(found)
    assert past.damaged > 0


@pytest.mark.parametrize("sealed", [True, False])
def test_a_segment_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sealed: bool) -> None:
    """One that can't be opened, as root has put it there, is passed over, or set aside by a start; others are read."""
    directory, batches = tmp_path / "flows", some_batches(20)
    first = write_segment(directory, batches[:10], 1, sealed=sealed)
    write_segment(directory, batches[10:], 2)
    opened = os.open

    def refuse(path: Path, flags: int, mode: int = 0o777) -> int:
        if str(path).endswith(first.name):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opened(path, flags, mode)

    monkeypatch.setattr(os, "open", refuse)
    if sealed:
        found, portion = read_all(directory)
        assert found == written(batches[10:])
        assert portion.unreadable == [first]
    else:
        with pytest.raises(PermissionError):
            read_all(directory)
        (aside,) = recovered(directory)
        assert aside.now is not None
        assert aside.now.is_bad
        assert read_all(directory)[0] == written(batches[10:])
