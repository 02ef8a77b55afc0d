from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.datagrams.batch import DatagramBatch
from shared.journal import encoding
from shared.journal.records import Identity
from shared.journal.segment_writer import SegmentWriter
from shared.journal.segments import Segment
from tests.builders import SOURCES
from tests.shared.journal.filled import AT, NOW, batch_of, identities

Numbered = tuple[Identity, DatagramBatch]
sources = st.sampled_from([SOURCES, SOURCES[:1], ["2001:db8::1", "ff02::1"]]).flatmap(st.sampled_from)
payloads = st.one_of(st.binary(max_size=70), st.just(bytes(40)))
datagrams = st.lists(st.tuples(sources, st.integers(0, 65_535), payloads), min_size=1, max_size=12)


@st.composite
def batches(draw: st.DrawFn) -> list[Numbered]:
    """Return batches of both families, received at different times, end to end or at multiples of a stride."""
    some = draw(
        st.lists(st.tuples(datagrams, st.sampled_from([0, 70, 128]), st.integers(0, 1 << 62)), min_size=1, max_size=9)
    )
    made = [batch_of(rows, at_ns, stride) for rows, stride, at_ns in some]
    return list(zip(identities(rows=[len(each) for each in made]), made, strict=True))


def write(directory: Path, groups: list[list[Numbered]], few: int) -> bytes:
    """Return the bytes of a segment into which batches are written, some at a time."""
    writer = SegmentWriter(directory, Segment("flows", 1, NOW, is_open=True), AT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "FEW_PACKETS", few)
        for group in groups:
            writer.append(group)
    path = directory / writer.seal().name
    written = path.read_bytes()
    assert (len(written), writer.rows) == (writer.size, sum(len(batch) for group in groups for _, batch in group))
    path.unlink()
    return written


@given(some=batches(), cuts=st.sets(st.integers(1, 8)))
def test_together_or_one_by_one_the_bytes_are_the_same(
    tmp_path_factory: pytest.TempPathFactory, some: list[Numbered], cuts: set[int]
) -> None:
    """Batches that are written together, as arrays or not, are the records that they are one by one."""
    directory = tmp_path_factory.getbasetemp()
    bounds = [0, *sorted(cut for cut in cuts if cut < len(some)), len(some)]
    groups = [some[start:stop] for start, stop in pairwise(bounds)]
    alone = write(directory, [[each] for each in some], few=1 << 20)
    assert write(directory, groups, few=1 << 20) == alone
    assert write(directory, [[each] for each in some], few=0) == alone
    assert write(directory, groups, few=0) == alone
