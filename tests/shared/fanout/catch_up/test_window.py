import time
from dataclasses import replace
from types import SimpleNamespace

from shared.bus.continuity import MAX_POSITIONS, Worker
from shared.fanout.catch_up.window import SECONDS, Numbered, Window
from tests.builders import make_batch

WORKER = "ingest.1", 1


def test_what_the_journal_may_lack_leaves_room_for_what_comes_live() -> None:
    """The disk is full while a collector is away: of what is too much the oldest go, and others can still get level."""
    at = SimpleNamespace(now=0.0)
    window = Window(lambda: at.now, most_bytes=100_000)
    for number in range(500):
        window.add(Numbered(WORKER, number, number, make_batch([bytes(200)])))
        window.confirm(number, {WORKER: number + 1})  # each time it has lost more
        at.now += SECONDS / 5
    assert 90_000 < window.size <= 100_000
    assert window.covers(WORKER, 496, 500)
    first = window.find(WORKER, 0)
    assert first is not None
    assert 400 < first.total < 440


def test_workers_that_have_ended_are_forgotten() -> None:
    """Workers are started anew again and again: once nothing of one is kept, nothing is known of it."""
    at = SimpleNamespace(now=0.0)
    window = Window(lambda: at.now)
    reached: dict[Worker, int] = {}
    for boot in range(20):
        worker = "ingest.1", boot
        window.add(Numbered(worker, 1, 0, make_batch([b"x"])))
        reached[worker] = 1
        window.confirm(boot // 10, reached)
        window.confirm(boot // 10, {**reached, ("ingest.2", boot): 5})
        at.now += SECONDS
        window.trim()
        window.forget({worker: 1})
        known = window._runs.keys(), window._suspect.keys(), window._opening.keys(), window._open
        assert all(each <= {worker} for each in known), known
    assert (window.size, window.first, window.stop) == (0, 20, 20)


def test_what_was_received_since_a_window_is_there_is_counted_as_it_goes() -> None:
    """Other nodes' datagrams that come late were received before: nobody knows who owes them."""
    at = SimpleNamespace(now=0.0)
    window = Window(lambda: at.now, journaled=False)
    for number, received_ns in enumerate((1, time.time_ns(), time.time_ns())):
        batch = replace(make_batch([b"x", b"y"]), received_ns=received_ns)
        window.add(Numbered(WORKER, number, 2 * number, batch))
        at.now += 0.75 * SECONDS
    assert window.let_go == {}
    for count in (2, 4):
        window.trim()
        assert window.let_go == {WORKER: count}
        at.now += 0.75 * SECONDS


def test_what_was_let_go_of_workers_without_end_does_not_fill_the_memory() -> None:
    """Workers are started anew again and again: of those that were last it is known."""
    at = SimpleNamespace(now=0.0)
    window = Window(lambda: at.now, journaled=False)
    for boot in range(MAX_POSITIONS + 3):
        window.add(Numbered(("uplink.1", boot), 0, 0, replace(make_batch([b"x"]), received_ns=time.time_ns())))
    at.now += SECONDS
    window.trim()
    assert [*window.let_go] == [("uplink.1", boot) for boot in range(3, MAX_POSITIONS + 3)]
