from services.offload.planning.mark_watch import AGAIN_SECONDS, UNREAD, UNREAD_SECONDS, MarkWatch


class Watched:
    """A watch on a clock that the test moves."""

    def __init__(self) -> None:
        self.now = 100.0
        self.watch = MarkWatch(lambda: self.now)
        self.reporting = self.now, self.now

    def note(self, marked: int, read: int, received: int | None = None, *, reporting: bool = True) -> str:
        """Note counts a second later, as many received as marked unless told otherwise; return the reason then."""
        self.now += 1
        before = self.watch.reason
        if reporting:
            self.reporting = self.reporting[0], self.now
        counts = {"syslog": marked}, {"syslog": read}, {"syslog": marked if received is None else received}
        assert self.watch.note(*counts, self.reporting) == (before != self.watch.reason)
        return self.watch.reason


def test_marks_that_do_not_come_are_noticed() -> None:
    """Once enough marks were set, and none has come for seconds, the stream is named; later it is tried again."""
    watched = Watched()
    assert watched.note(0, 0) == ""
    for second in range(int(UNREAD_SECONDS) + 1):
        reason = watched.note(UNREAD * (second + 1), 0)
    assert reason == "another program takes the marks of stream syslog away; see [offload] mark_mask"
    watched.now += AGAIN_SECONDS
    assert watched.note(1000, 0) == ""


def test_marks_that_come_late_or_to_nobody_are_no_reason() -> None:
    """Not while they come, are few, no worker reports, or the counters begin anew."""
    watched = Watched()
    for second in range(20):
        assert watched.note(1000 * second, 1000 * second - 500) == ""
    for _ in range(20):
        assert watched.note(19_000 + UNREAD - 1, 18_500) == ""
    for second in range(20):
        assert watched.note(20_000 * second, 18_500, reporting=False) == ""
    assert watched.note(5, 18_500) == ""
    assert watched.note(10, 18_500) == ""


def test_burst_behind_a_silence_is_no_reason() -> None:
    """Marks of a stream that was silent are counted before a worker's next report has them."""
    watched = Watched()
    for _ in range(20):
        assert watched.note(100, 100) == ""
    assert watched.note(100 + UNREAD, 100) == ""
    assert watched.note(100 + UNREAD, 100 + UNREAD) == ""


def test_marks_of_a_worker_that_stands_still_are_no_reason() -> None:
    """While no report comes nothing is known; and the first one of a worker that was restarted has read nothing yet."""
    watched = Watched()
    for second in range(9):
        assert watched.note(1000 * second, 100, reporting=False) == ""
    watched.reporting = watched.now, watched.now
    assert watched.note(9000, 100) == ""
    assert watched.note(10_000, 1000) == ""


def test_marks_that_wait_at_a_worker_that_stands_still_are_no_reason() -> None:
    """Long after it was given up its socket takes in what was marked; others receive none of it, or a few without."""
    watched = Watched()
    for second in range(30):
        assert watched.note(1000 * second, 0, 10_000) == ""
    for second in range(30, 60):
        assert watched.note(1000 * second, 0, 10_000 + 100 * second) == ""
    for second in range(60, 64):
        reason = watched.note(1000 * second, 0, 1000 * second)
    assert reason


def test_marks_that_came_to_no_worker_are_no_reason() -> None:
    """An exporter that sends only while ingest is restarted: nothing of its stream was read before, nor is later."""
    watched = Watched()
    for second in range(5):
        assert watched.note(100 * second, 0, reporting=False) == ""
    watched.reporting = watched.now, watched.now
    for _ in range(20):
        assert watched.note(400, 0) == ""
    for _ in range(int(UNREAD_SECONDS) + 1):
        reason = watched.note(400 + UNREAD, 0)
    assert reason
