import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from services.transmitter.few_rows import FEW_ROWS, FewFrames, frames_of
from services.transmitter.packets.addressing import Identification
from services.transmitter.plan import largest_payload
from shared.datagrams.batch import DatagramBatch
from shared.datagrams.gathered import Gathered
from tests.services.transmitter.test_plan import PLAN, by_source, gathered, memory_of, runs, sent, target

FEW = FewFrames()
"""One for all tests, as a transmitter has: what earlier frames left in its memory must not show."""


class Numbered(Identification):
    """Numbers from a beginning of the test's choice."""

    def __init__(self, first: int) -> None:
        super().__init__()
        self._next = first


class View:
    """The frames as a plan shows them."""

    def __init__(self, frames: int) -> None:
        self.messages, self.frames = FEW.messages, frames


def strided(batch: DatagramBatch) -> DatagramBatch:
    """The same datagrams at a distance from each other, as they come in lent memory."""
    stride = int(batch.lengths.max(initial=0)) + 3
    payload = b"".join(payload.ljust(stride, b"?") for _, _, payload in batch.datagrams())
    return DatagramBatch(batch.stream, batch.received_ns, batch.rows, payload, stride)


@settings(max_examples=100)
@given(
    runs,
    st.sampled_from([1280, 1500, 9000]),
    st.booleans(),
    st.integers(1, 3),
    st.integers(0, 1 << 32),
    st.sampled_from([1, 1, 8]),
    st.booleans(),
    st.data(),
)
def test_few_frames_hold_what_planned_ones_do(
    found: list[tuple[int, int, int]],
    mtu: int,
    segmentation: bool,
    cuts: int,
    first: int,
    times: int,
    apart: bool,
    data: st.DataObject,
) -> None:
    """Made one by one or by arrays, frames bring the same datagrams, in order; both take as many numbers."""
    batch = gathered(4, found * times, cuts)
    assume(len(batch) <= FEW_ROWS)
    if apart:
        batch = Gathered([strided(each) for each in batch.batches])
    chosen = data.draw(st.none() | st.lists(st.booleans(), min_size=len(batch), max_size=len(batch)).filter(any))
    rows = None if chosen is None else np.flatnonzero(np.array(chosen, np.bool_))
    frames = frames_of(batch, rows, mtu, segmentation=segmentation)
    lengths = batch.lengths if rows is None else batch.lengths[rows]
    assert (frames is None) == bool(lengths.max() > largest_payload(4, mtu))
    if frames is None:
        return
    PLAN.build(batch, rows, 4, mtu, link=True, segmentation=segmentation)
    FEW.build(frames)
    numbers = [Numbered(first % (1 << 32)) for _ in range(2)]
    for port in (2055, 9):  # a second collector gets the same frames
        PLAN.address([target(4, port=port)], [b"name"], numbers[:1])
        FEW.address(target(4, port=port), b"name", numbers[1])
        planned, few = (
            by_source([(each.datagram.source, each.datagram.source_port, each.datagram.payload) for each in came])
            for came in (sent(PLAN, 4, link=True), sent(View(len(frames)), 4, link=True))
        )
        assert few == planned
        assert all(len(frame) <= max(mtu, 65_535 if segmentation else 0) + 24 for frame in memory_of(View(len(frames))))
    assert numbers[0].draw(0) == numbers[1].draw(0)
    for at in range(len(frames) + 1):
        left = [row for frame in frames[at:] for row in frame.rows]
        assert FEW.rest(at).tolist() == sorted(left)


def test_a_frame_holds_no_more_than_the_kernel_cuts() -> None:
    """More rows of one source than fit a frame go in several, in order, whole and with a shorter one last."""
    batch = gathered(4, [(1, 200, FEW_ROWS - 1), (1, 100, 1)])
    frames = frames_of(batch, None, 1500, segmentation=True)
    assert frames is not None
    assert [len(frame.rows) for frame in frames] == [64] * (FEW_ROWS // 64)
    assert [row for frame in frames for row in frame.rows] == list(range(FEW_ROWS))
