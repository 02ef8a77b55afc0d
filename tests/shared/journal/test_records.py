from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.capture.reader import CaptureReader
from shared.datagrams.limits import MAX_DATAGRAM, MAX_PAYLOAD, MAX_ROWS
from shared.journal.records import (
    Identity,
    RecordError,
    first_block_size,
    parse_head,
    parse_option,
    read_batch,
    told_offset,
)
from shared.journal.segment_reader import SegmentReader
from shared.net.addresses import pack_address
from tests.builders import SOURCES
from tests.shared.journal.filled import AT, Datagram, as_written, batch_of, write_segment

datagrams = st.lists(
    st.tuples(st.sampled_from(SOURCES), st.integers(0, 65_535), st.binary(max_size=70)), min_size=1, max_size=20
)
numbers = st.integers(0, 1 << 62)


@given(
    some=datagrams,
    more=datagrams,
    stride=st.sampled_from([0, 70, 128]),
    identity=st.builds(Identity, st.from_regex(r"[a-z]{1,9}\.[0-9]{1,9}", fullmatch=True), numbers, numbers, numbers),
)
def test_what_was_written_is_read(
    tmp_path_factory: pytest.TempPathFactory,
    some: list[Datagram],
    more: list[Datagram],
    stride: int,
    identity: Identity,
) -> None:
    """A batch comes back with its identity, time, sources and bytes, and any pcapng reader finds the same in it."""
    directory = tmp_path_factory.mktemp("written")
    written = [(identity, batch_of(some, 1 << 62, stride)), (Identity("ingest.2", 1, 2, 3), batch_of(more))]
    segment = write_segment(directory, written)
    with SegmentReader(directory / segment.name, segment) as reader:
        heads = list(reader.heads())
        read = [reader.read(head) for head in heads]
        assert (reader.damaged, reader.end) == (0, reader.size)
    assert [as_written(head.identity, batch) for head, (batch, _) in zip(heads, read, strict=True)] == [
        as_written(*each) for each in written
    ]
    for batch, destination in read:
        six = {":" in source for source, *_ in batch.datagrams()}
        assert destination.port == AT.port
        assert {*([destination.six] if True in six else []), *([destination.four] if False in six else [])} <= {
            AT.four,
            AT.six,
        }
    with (directory / segment.name).open("rb") as file:
        plain = [(each.captured_ns, each.source, each.source_port, each.payload) for each in CaptureReader(file)]
    assert plain == [
        (batch.received_ns, pack_address(source), port, payload)
        for _, batch in written
        for source, port, payload in batch.datagrams()
    ]


@pytest.mark.parametrize(
    "lengths",
    [
        [MAX_DATAGRAM] * 8,
        [4 * MAX_PAYLOAD // MAX_ROWS] * MAX_ROWS,
        [0] * MAX_ROWS,
        [400] * MAX_ROWS,
        [*range(MAX_ROWS)],
    ],
)
@pytest.mark.parametrize("sources", [["192.0.2.1"], ["2001:db8::1"], ["192.0.2.1", "2001:db8::1", "::ffff:0:1"]])
def test_the_largest_batches(tmp_path: Path, lengths: list[int], sources: list[str]) -> None:
    """Batches as large as they can be, of equal lengths or of none alike, come back as they were."""
    some = [(sources[at % len(sources)], at, bytes([at % 251]) * length) for at, length in enumerate(lengths)]
    written = Identity("ingest.1", 1, 0, 0), batch_of(some)
    segment = write_segment(tmp_path, [written])
    with SegmentReader(tmp_path / segment.name, segment) as reader:
        (head,) = reader.heads()
        assert as_written(head.identity, reader.read(head)[0]) == as_written(*written)


def test_damage_is_refused_with_its_reason(tmp_path: Path) -> None:
    """Each part of a record that can't be right is a RecordError that says what is wrong."""
    written = Identity("ingest.1", 1, 0, 0), batch_of([("192.0.2.1", 1, b"one"), ("192.0.2.2", 2, b"three")])
    segment = write_segment(tmp_path, [written])
    with SegmentReader(tmp_path / segment.name, segment) as reader:
        (head,) = reader.heads()
    image = (tmp_path / segment.name).read_bytes()
    record, began_ns = image[head.offset : head.end], segment.began_ns
    block = record[: first_block_size(record)]
    option = block[head.option_at :]

    def changed(data: bytes, at: int, value: bytes) -> bytes:
        return data[:at] + value + data[at + len(value) :]

    def refused(reason: str, read: Callable[..., object], *arguments: object) -> None:
        with pytest.raises(RecordError, match=reason):
            read(*arguments)

    assert parse_head(block, head.offset, began_ns) == head
    refused("the block is cut short", first_block_size, record[:20])
    refused("no block of a datagram", first_block_size, changed(record, 0, b"\5"))
    refused("no identity", parse_head, changed(block, head.option_at, b"F"), head.offset, began_ns)
    refused("of another segment, or damaged", parse_head, block, head.offset, began_ns + 1)
    refused("the identity is cut short", told_offset, option[:20])
    refused("the identity is cut short", parse_option, option[:-12], head.option_at, head.offset, began_ns)
    refused("the identity is damaged", parse_head, block.replace(b"ingest", b"\xff" * 6), head.offset, began_ns)
    refused("the record is cut short", read_batch, head, record[:-1])
    refused("lengths do not add up", read_batch, head._replace(size=head.size + 4), record + bytes(4))
    refused("its checksum is wrong", read_batch, head, record.replace(b"three", b"threE"))
    refused("its checksum is wrong", read_batch, head._replace(option=head.option.replace(b"1", b"2")), record)
