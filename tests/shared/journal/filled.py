"""Makes segments of known batches for the tests of the journal."""

from collections.abc import Iterable, Sequence
from itertools import count
from pathlib import Path

from shared.bus.bodies.journal_messages import JournalPlace, JournalRead, WorkerPosition
from shared.capture.pcapng import Destination
from shared.datagrams.batch import DatagramBatch, make_rows
from shared.journal.directory import segments_in
from shared.journal.reading import Portion, read_portion
from shared.journal.records import Identity
from shared.journal.segment_writer import SegmentWriter
from shared.journal.segments import SECOND, Segment
from shared.net.addresses import pack_address

NOW = 1_795_000_000_123_456_789
AT = Destination(2055, pack_address("192.0.2.250"), pack_address("2001:db8::250"))
Datagram = tuple[str, int, bytes]
Written = tuple[Identity, int, list[Datagram]]
"""A batch as it went in: its identity, time and datagrams."""


def batch_of(some: Sequence[Datagram], at_ns: int = NOW, stride: int = 0, stream: str = "flows") -> DatagramBatch:
    """Make a batch, its payloads end to end or at multiples of a stride, with other bytes between them."""
    lengths, ports = [len(payload) for *_, payload in some], [port for _, port, _ in some]
    rows = make_rows(lengths, [pack_address(source) for source, *_ in some], ports)
    return DatagramBatch(stream, at_ns, rows, b"".join(payload.ljust(stride, b"?") for *_, payload in some), stride)


def as_written(identity: Identity, batch: DatagramBatch) -> Written:
    """Return what has to come back of a batch."""
    return identity, batch.received_ns, list(batch.datagrams())


def identities(worker: str = "ingest.1", boot: int = 9, *, rows: Iterable[int]) -> list[Identity]:
    """Return the identities of a worker's batches of so many rows."""
    total, found = 0, []
    for sequence, each in zip(count(), rows, strict=False):
        found.append(Identity(worker, boot, sequence, total))
        total += each
    return found


def write_segment(
    directory: Path, batches: Iterable[tuple[Identity, DatagramBatch]], number: int = 1, *, sealed: bool = True
) -> Segment:
    """Write a segment with these batches; return it as it is then."""
    directory.mkdir(parents=True, exist_ok=True)
    some = list(batches)
    began_ns = some[0][1].received_ns if some else NOW
    writer = SegmentWriter(directory, Segment("flows", number, began_ns, is_open=True), AT)
    for each in some:
        writer.append([each])
    segment = writer.seal()
    if sealed:
        return segment
    left = Segment("flows", number, began_ns, is_open=True)
    (directory / segment.name).rename(directory / left.name)
    return left


def read_all(
    directory: Path,
    *positions: WorkerPosition,
    since_ns: int = 0,
    rows: int = 1 << 16,
    payload: int = 8 << 20,
    use_places: bool = True,
) -> tuple[list[Written], Portion]:
    """Read a stream's journal from positions to its end, portion by portion; return the batches and the last portion.

    Its counts are those of all portions together.
    """
    found: list[Written] = []
    expired = missing = damaged = 0
    place: JournalPlace | None = None
    now = list(positions)
    while True:
        wanted = JournalRead(1, "replay/forwarder.1.a/", "flows", since_ns, now, rows, payload, place)
        portion = read_portion(directory, lambda: segments_in(directory.parent, directory.name), wanted)
        found += [as_written(*each) for each in portion.batches]
        expired, missing, damaged = (
            expired + portion.expired, missing + portion.missing, damaged + portion.damaged,
        )  # fmt: skip
        if portion.at_end:
            portion.expired, portion.missing, portion.damaged = expired, missing, damaged
            return found, portion
        now, place = list(portion.positions.values()), portion.place if use_places else None


def times(count_of: int, step_ns: int = SECOND) -> list[int]:
    """Return the times of batches, one after the other."""
    return [NOW + number * step_ns for number in range(count_of)]
