import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from shared.bus.bodies.exporters_message import MAX_TOLD
from shared.bus.messages import decode, encode, exporters_topic
from shared.bus.publishing import exporter_shares
from shared.bus.publishing.exporter_shares import ExporterShares
from shared.datagrams.batch import ROW, Rows


def rows_of(senders: list[int], length: int = 100) -> Rows:
    """Rows whose source addresses end in these numbers."""
    rows = np.zeros(len(senders), ROW)
    rows["length"] = length
    rows["address"][:, 12:] = np.array(senders, ">u4").view(np.uint8).reshape(-1, 4)
    return rows


@given(st.lists(st.lists(st.integers(0, 9), max_size=20), max_size=10))
def test_every_exporter_is_counted(batches: list[list[int]]) -> None:
    """At a low rate each exporter has all of its datagrams and bytes, those with most first, and then none."""
    shares = ExporterShares("messages")
    for number, batch in enumerate(batches):
        rows = rows_of(batch)
        shares.note(rows.tobytes() if number % 2 else rows)
    told = shares.take()
    sent = [sender for batch in batches for sender in batch]
    assert {(address[-1], count, size) for address, count, size in told.most} == {
        (sender, sent.count(sender), 100 * sent.count(sender)) for sender in set(sent)
    }
    counts = [count for _, count, _ in told.most]
    assert counts == sorted(counts, reverse=True)
    assert (told.rows, told.every, told.exporters) == (len(sent), 1, len(set(sent)))
    assert (told.missed, shares.take().most) == (None, [])


def test_at_high_rates_a_sample_is_looked_at() -> None:
    """Beyond the rows that may be examined every n-th is, whatever the batches' sizes, and few enough are told."""
    shares = ExporterShares("messages")
    shares._began -= 1.0
    shares.note(rows_of(list(range(4 * exporter_shares.EXAMINED))))
    assert shares.take().every == 1  # the next ones are a sample
    for _ in range(1000):
        shares.note(rows_of([1, 2, 3]))
    told = shares.take()
    assert (told.rows, told.every in (3, 4)) == (3000, True)
    assert 700 <= sum(count for _, count, _ in told.most) <= 1000
    shares._every = 1
    shares.note(rows_of(list(range(2 * MAX_TOLD))))
    told = shares.take()
    assert (len(told.most), told.exporters) == (MAX_TOLD, 2 * MAX_TOLD)
    topic = exporters_topic("ingest.1")
    assert decode(encode(topic, told, sender="ingest.1", boot=1, sequence=0, total=0)).body == told
