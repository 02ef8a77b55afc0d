import ctypes
import socket
from collections import defaultdict
from collections.abc import Iterable

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from services.forwarder.plan import UDP_SEGMENT, SendPlan
from shared.datagrams.batch import DatagramBatch
from shared.datagrams.gathered import Gathered
from shared.datagrams.gso_runs import MAX_SEGMENTS, MAX_SEND
from shared.datagrams.limits import MAX_DATAGRAM, MAX_ROWS
from shared.datagrams.mmsg import IOVEC
from tests.builders import SOURCES, make_batch

PLAN = SendPlan()
"""One for all tests, as a forwarder has: what an earlier plan left in its memory must not show."""

common = st.sampled_from([0, 1, 2, 99, 100, 1464, 1465, 9000, 32_500, 32_501])
runs = st.lists(st.tuples(common | st.integers(0, 3000), st.integers(1, 140)), max_size=8)
few_long = st.lists(st.sampled_from([MAX_DATAGRAM, MAX_SEND, MAX_SEND + 1, 0, 1]) | common, max_size=12)
lengths_of_batches = few_long | runs.map(lambda found: [length for length, count in found for _ in range(count)])
largest_segments = st.sampled_from([0, 1, 100, 1464, 65_508]) | st.integers(0, 70_000)


def batch_of(lengths: list[int], sources: int = 1) -> DatagramBatch:
    """A batch of so many sources whose payloads all differ where they can."""
    payloads = [(b"%d." % number * (length // 2 + 1))[:length] for number, length in enumerate(lengths)]
    return make_batch(payloads, SOURCES[:sources])


def sends_of(plan: SendPlan) -> list[tuple[bytes, int]]:
    """Return each send's bytes as the kernel would read them, and the length to cut them at, 0 for none."""
    found = []
    for header in plan.headers[: plan.sends]:
        assert (header["name"], header["namelen"], header["flags"]) == (0, 0, 0)
        iovecs = np.frombuffer(ctypes.string_at(int(header["iov"]), int(header["iovlen"]) * IOVEC.itemsize), IOVEC)
        data = b"".join(ctypes.string_at(int(base), int(size)) if size else b"" for base, size in iovecs)
        found.append((data, segment_of(int(header["control"]), int(header["controllen"]))))
    return found


def segment_of(at: int, size: int) -> int:
    """The uint16 of the one control message of a send, read as recvmsg(2) would give it."""
    assert (at == 0) == (size == 0)
    if not size:
        return 0
    control = ctypes.string_at(at, size)
    length, level, kind = np.frombuffer(control, "u8", 1)[0], *np.frombuffer(control, "i4", 2, 8)
    assert (size, length, level, kind) == (socket.CMSG_SPACE(2), socket.CMSG_LEN(2), socket.IPPROTO_UDP, UDP_SEGMENT)
    return int(np.frombuffer(control, "u2", 1, 16)[0])


def cut(data: bytes, segment: int) -> list[bytes]:
    """The datagrams that the kernel makes of a send."""
    return [data[at : at + segment] for at in range(0, len(data), segment)] if segment else [data]


def by_source(datagrams: Iterable[tuple[str, bytes]]) -> dict[str, list[bytes]]:
    """Return the datagrams of each exporter, in order."""
    found = defaultdict(list)
    for source, payload in datagrams:
        found[source].append(payload)
    return found


@settings(max_examples=75)
@given(lengths_of_batches, largest_segments, st.integers(1, len(SOURCES)), st.data())
def test_sends_are_exactly_the_selected_rows(
    lengths: list[int], largest_segment: int, sources: int, data: st.DataObject
) -> None:
    """The sends hold the selected rows, each exporter's in order, and obey every limit of a segmented send."""
    batch = batch_of(lengths[:MAX_ROWS], sources)
    chosen = data.draw(st.none() | st.lists(st.booleans(), min_size=len(batch), max_size=len(batch)))
    indices = None if chosen is None else np.flatnonzero(np.array(chosen, np.bool_))
    PLAN.build(Gathered([batch]), indices, largest_segment)
    datagrams = [(source, payload) for source, _, payload in batch.datagrams()]
    selected = np.arange(len(batch)) if indices is None else indices
    order, sends = PLAN.rest(0), sends_of(PLAN)
    assert sorted(order.tolist()) == selected.tolist()
    assert [datagram for send in sends for datagram in cut(*send)] == [datagrams[row][1] for row in order]
    assert by_source(datagrams[row] for row in order) == by_source(datagrams[row] for row in selected)
    assert [PLAN.rest(sent).tolist() for sent in range(len(order) + 1)] == [
        order[sent:].tolist() for sent in range(len(order) + 1)
    ]
    if sources == 1 or not largest_segment:
        assert order.tolist() == selected.tolist()
    assert (PLAN.rows, PLAN.sends) == (len(selected), len(sends))
    rows = size = 0
    for number, (sent, segment) in enumerate(sends):
        assert (PLAN.rows_before[number], PLAN.bytes_before[number]) == (rows, size)
        assert PLAN.segmented(number) == (segment > 0)
        together = cut(sent, segment)
        if segment:
            assert 1 < len(together) <= MAX_SEGMENTS
            assert len(sent) <= MAX_SEND
            assert 0 < len(together[-1]) <= segment == len(together[0]) <= largest_segment
        rows, size = rows + len(together), size + len(sent)
    assert (PLAN.rows_before[len(sends)], PLAN.bytes_before[len(sends)]) == (rows, size)


def test_empty_batch_has_no_sends() -> None:
    """Nothing selected is nothing sent."""
    for indices in (None, np.empty(0, np.intp)):
        PLAN.build(Gathered([make_batch([])]), indices, 1464)
        assert (PLAN.sends, PLAN.rows) == (0, 0)
