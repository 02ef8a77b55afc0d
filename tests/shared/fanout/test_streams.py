from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from structlog.testing import capture_logs

from shared.bus.kept_counts import KeptFile
from shared.bus.messages import Envelope, Status, datagrams_topic
from shared.bus.zmq_sockets import Subscriber
from shared.fanout import streams
from shared.fanout.streams import WORKER_SECONDS, FollowedStreams


class Workers:
    """Ingest workers as a sender of copies hears of them, at times that the test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.living = 100.0, ["ingest.1", "ingest.2"]
        monkeypatch.setattr(
            streams, "time", SimpleNamespace(monotonic=lambda: self.now, time_ns=lambda: int(self.now * 1e9))
        )
        locks = SimpleNamespace(
            among=lambda _: self.living, all_in=lambda heard: {"ingest.1", "ingest.2"} <= set(heard)
        )
        monkeypatch.setattr(streams, "LivingWorkers", lambda _: locks)
        ignore: Callable[[str], None] = lambda _: None  # noqa: E731 - a signature for mypy
        subscriber = cast(Subscriber, SimpleNamespace(subscribe=ignore, unsubscribe=ignore))
        self.followed = FollowedStreams(subscriber, Path("/bus"), KeptFile(Path("/bus/accounts")))

    def pass_time(self, seconds: int, *reporting: tuple[str, int]) -> bool:
        """Let seconds pass, with a report of each of these workers, by name and boot id; return whether copies flow."""
        for _ in range(seconds):
            self.now += 1.0
            for name, boot in reporting:
                envelope = Envelope(1, "status", name, boot, 0, 0)
                self.followed.reconcile(envelope, Status(name, 1, 0, 1, 0, 1, {}))
            self.followed.sort_out_silent_workers()
        return self.followed.flowing


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Workers:
    """Two workers that live."""
    return Workers(monkeypatch)


FIRST, SECOND, PATIENCE = ("ingest.1", 1), ("ingest.2", 2), int(WORKER_SECONDS)


def test_one_worker_of_two_that_hangs_stops_the_flow(workers: Workers) -> None:
    """Copies do not flow while a worker lives and is silent; it is named once, and all is well when it goes on."""
    assert workers.pass_time(PATIENCE, FIRST, SECOND)
    with capture_logs() as logs:
        assert not workers.pass_time(2 * PATIENCE, FIRST)
    assert [(line["event"], line["worker"]) for line in logs] == [
        ("an ingest worker that runs is not heard of: it or the broker hangs", "ingest.2")
    ]
    assert workers.pass_time(1, FIRST, SECOND)


def test_worker_that_has_ended_stops_nothing(workers: Workers) -> None:
    """Copies flow from the worker that is left, all the time; a successor that hangs before its first report counts."""
    assert workers.pass_time(PATIENCE, FIRST, SECOND)
    workers.living = ["ingest.1"]
    assert all(workers.pass_time(1, FIRST) for _ in range(2 * PATIENCE))
    workers.living = ["ingest.1", "ingest.2"]
    assert workers.pass_time(PATIENCE, FIRST)
    assert not workers.pass_time(1, FIRST)


def test_restarted_worker_is_no_other_one(workers: Workers) -> None:
    """The silence of a worker's former start is of no account once its successor is heard."""
    assert workers.pass_time(PATIENCE, FIRST, SECOND)
    assert all(workers.pass_time(1, FIRST, ("ingest.2", 3)) for _ in range(2 * PATIENCE))


def test_what_was_missed_never_falls(workers: Workers) -> None:
    """Datagrams that a process has missed are counted for as long as it runs, though it forgets their stream."""
    followed = workers.followed
    for stream, missed in (("s", 30), ("t", 5)):
        followed.subscribe_to([stream])  # and the one before is wanted no more
        for sequence, total in ((0, 0), (1, missed - 2)):
            followed.note_batch(datagrams_topic(stream), Envelope(1, "", "ingest.1", 1, sequence, total), 0)
        account = {f"stream/{stream}": {"published": missed}}
        followed.reconcile(Envelope(1, "status", "ingest.1", 1, 0, 0), Status("ingest.1", 1, 1, 1, 0, 1, account))
    assert [account["missed"] for account in followed.accounts().values()] == [5]
    assert followed.counters["bus_missed"] == 35


def test_a_clock_that_was_set_back_hides_no_loss(workers: Workers) -> None:
    """Datagrams that a new worker had published before it heard of us are owed, whatever its clock says."""
    followed, topic = workers.followed, datagrams_topic("s")
    followed.subscribe_to(["s"])

    def hear(boot: int, published: int) -> None:
        envelope = Envelope(1, "status", "ingest.1", boot, 0, published)
        followed.note_batch(topic, envelope, 0)
        account = {"stream/s": {"published": published}}
        followed.reconcile(envelope, Status("ingest.1", 1, int(workers.now * 1e9), 1, 0, 1, account))

    workers.now -= 10  # this worker was there before us
    hear(1, 7)
    assert followed.published["s"] == 0
    workers.now -= 3600
    hear(2, 50)
    assert followed.published["s"] == 50
    assert [unserved.datagrams for unserved in followed.pop_unserved()] == [50]
