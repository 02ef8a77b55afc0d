from services.gateway.transport.rate_limit import BURST_SECONDS, RateLimit


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_as_many_at_once_then_at_the_rate() -> None:
    """A burst passes; after it each request waits one interval longer than the last, and time gives it back."""
    clock = Clock()
    limit = RateLimit(2, 5, clock)
    burst = int(2 * BURST_SECONDS)
    assert [limit.note_request("a") for _ in range(burst)] == [0.0] * burst
    assert [limit.note_request("a") for _ in range(3)] == [0.5, 1.0, 1.5]
    assert limit.note_request("b") == 0.0
    clock.now += 3.0
    assert [limit.note_request("a") for _ in range(4)] == [0.0, 0.0, 0.0, 0.5]


def test_nobody_waits_for_those_that_have_gone() -> None:
    """A request waits for those of other connections, however many have asked before and gone without an answer."""
    clock = Clock()
    limit = RateLimit(2, 5, clock)
    for _ in range(1000):
        limit.note_request("a")
    assert limit.note_request("a") == 2.5
    clock.now += 2.5
    assert limit.note_request("a") == 0.5


def test_as_many_as_may_wait_keep_the_rate() -> None:
    """Connections that each ask again when they have waited get as many answers together as the rate allows."""
    clock, connections = Clock(), 5
    limit = RateLimit(2, connections, clock)
    for _ in range(int(2 * BURST_SECONDS)):
        limit.note_request("a")
    due = [clock.now + limit.note_request("a") for _ in range(connections)]
    for _ in range(200):
        clock.now = min(due)
        due.remove(clock.now)
        due.append(clock.now + limit.note_request("a"))
    assert clock.now == Clock.now + 200 / 2


def test_no_slower_than_the_rate_never_waits() -> None:
    """At exactly its rate an address never waits, however long it goes on."""
    clock = Clock()
    limit = RateLimit(4, 5, clock)
    for _ in range(10_000):
        assert limit.note_request("a") == 0.0
        clock.now += 0.25


def test_addresses_are_forgotten() -> None:
    """Only addresses that were faster than the rate are remembered, however many come."""
    clock = Clock()
    limit = RateLimit(10, 5, clock)
    for number in range(1000):
        limit.note_request(str(number))
    for _ in range(100):
        limit.note_request("fast")
    clock.now += 0.2
    limit.forget_slow()
    assert len(limit) == 1
