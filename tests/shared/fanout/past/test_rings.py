from types import SimpleNamespace

import pytest

from shared.bus.messages import Datagrams, Status
from shared.fanout.past.rings import RING_SECONDS, Rings
from shared.fanout.past.window import SECONDS
from tests.builders import make_batch, make_envelope

KEPT, OTHER = "kept", "other"


def come(rings: Rings, stream: str, total: int) -> None:
    """Let a datagram come live."""
    rings.add(make_envelope(total, total), Datagrams(stream, 1), make_batch([b"x"], stream=stream))


@pytest.mark.parametrize("stream", [KEPT, OTHER])
def test_a_ring_on_which_somebody_has_caught_up_first_is_one_like_others(stream: str) -> None:
    """A start goes on with collectors before it knows of other nodes: what they may lack stays as long as ever."""
    at = SimpleNamespace(now=0.0)
    rings = Rings(lambda: at.now)
    rings.use([KEPT])
    rings.open(stream)
    rings.keep([stream])
    rings.close(stream)
    for total, after in ((0, RING_SECONDS - SECONDS), (1, SECONDS), (2, 0.0)):
        come(rings, stream, total)
        at.now += after
    assert (rings[stream].first, rings[stream].stop) == (1, 3)


def test_in_a_cluster_what_the_journal_has_not_stays_while_somebody_catches_up() -> None:
    """The journal is killed: who catches up gets what it has missed from the ring, however long that takes."""
    at = SimpleNamespace(now=0.0)
    rings = Rings(lambda: at.now)
    rings.use([KEPT])
    rings.keep([KEPT])
    rings.open(KEPT)
    for total in range(3):
        come(rings, KEPT, total)
        at.now += RING_SECONDS
    assert rings[KEPT].first == 0
    accounts = {f"journal/{KEPT}": {"taken": 2}, f"origin/ingest.1/1/{KEPT}": {"reached": 2}}
    for envelope in (make_envelope(sender="journal.1"), make_envelope(1, sender="journal.1")):
        rings.confirm(envelope, Status("journal.1", 1, 1, 1, 0, 1, accounts))
    assert rings[KEPT].first == 2
