from types import SimpleNamespace

import pytest

from shared.bus.messages import Datagrams, Status
from shared.fanout.catch_up import rings
from shared.fanout.catch_up.rings import RING_SECONDS, Rings
from shared.fanout.catch_up.window import SECONDS
from shared.process.memory import MUCH, Memory
from tests.builders import make_batch, make_envelope

KEPT, OTHER = "kept", "other"


def come(to: Rings, stream: str, total: int) -> None:
    """Let a datagram come live."""
    to.add(make_envelope(total, total), Datagrams(stream, 1), make_batch([b"x"], stream=stream))


@pytest.mark.parametrize("stream", [KEPT, OTHER])
def test_a_ring_on_which_somebody_has_caught_up_first_is_one_like_others(stream: str) -> None:
    """A start goes on with collectors before it knows of other nodes: what they may lack stays as long as ever."""
    at = SimpleNamespace(now=0.0)
    kept = Rings(lambda: at.now)
    kept.use([KEPT])
    kept.open(stream)
    kept.keep([stream])
    kept.close(stream)
    for total, after in ((0, RING_SECONDS - SECONDS), (1, SECONDS), (2, 0.0)):
        come(kept, stream, total)
        at.now += after
    assert (kept[stream].first, kept[stream].stop) == (1, 3)


def test_all_streams_together_have_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """One collector is away on many streams, and there is no journal: the stream with most lets go of its oldest."""
    monkeypatch.setattr(rings, "ALL_BYTES", 100_000)
    kept = Rings(lambda: 0.0)
    streams = ["large", *map(str, range(8))]
    kept.use(streams)
    for stream in streams:
        kept.open(stream)
    for total in range(200):
        come(kept, "large", total)
        for stream in streams[1:] if total < 5 else ():
            come(kept, stream, total)
    assert 98_000 < sum(window.size for _, window in kept.items()) <= 100_000
    assert [kept[stream].first for stream in streams[1:]] == [0] * 8
    assert kept["large"].first > 100


def test_when_memory_is_short_the_older_half_goes() -> None:
    """All windows let go of their oldest batches, until they take so little that it would hardly help."""
    kept = Rings(lambda: 0.0)
    kept.use([KEPT, OTHER])
    kept.keep([KEPT, OTHER])
    assert not kept.halve(Memory())
    for total in range(4096):
        for stream in (KEPT, OTHER):
            come(kept, stream, total)
    assert kept.halve(Memory())
    assert [2000 < kept[stream].first < 2100 for stream in (KEPT, OTHER)] == [True, True]
    assert kept[KEPT].covers(("ingest.1", 1), 2100, 4096)
    while kept.halve(Memory()):
        pass
    assert 0 < kept.size < MUCH


def test_in_a_cluster_what_the_journal_has_not_stays_while_somebody_catches_up() -> None:
    """The journal is killed: who catches up gets what it has missed from the ring, however long that takes."""
    at = SimpleNamespace(now=0.0)
    kept = Rings(lambda: at.now)
    kept.use([KEPT])
    kept.keep([KEPT])
    kept.open(KEPT)
    for total in range(3):
        come(kept, KEPT, total)
        at.now += RING_SECONDS
    assert kept[KEPT].first == 0
    accounts = {f"journal/{KEPT}": {"taken": 2}, f"origin/ingest.1/1/{KEPT}": {"reached": 2}}
    for envelope in (make_envelope(sender="journal.1"), make_envelope(1, sender="journal.1")):
        kept.confirm(envelope, Status("journal.1", 1, 1, 1, 0, 1, accounts))
    assert kept[KEPT].first == 2
