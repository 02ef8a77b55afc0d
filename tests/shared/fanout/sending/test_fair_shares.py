from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from shared.fanout.sending.fair_shares import ALERT_SECONDS, BEHIND_SECONDS, IDLE_SECONDS, FairShares


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def behind(clock: Clock) -> FairShares[str]:
    """Shares of a service that has lost messages, and is behind."""
    shares = FairShares[str](clock)
    wait(shares, clock)
    shares.note_loss()
    clock.now += 2 * BEHIND_SECONDS
    return shares


def wait(shares: FairShares[str], clock: Clock, seconds: float = 2 * IDLE_SECONDS) -> None:
    """Wait for a message, until it comes after so many seconds."""
    shares.begin_wait()
    clock.now += seconds
    shares.end_wait()


@given(st.dictionaries(st.sampled_from("abcdefgh"), st.integers(1, 1000), min_size=1), st.integers(1, 12))
def test_who_wants_less_than_a_share_gets_all(wanted: dict[str, int], rounds: int) -> None:
    """While the service is behind, the address that wants least always gets all of it; nobody alone is limited."""
    clock, got = Clock(), Counter[str]()
    shares = behind(clock)
    for _ in range(rounds):
        wishes = [(address, 1, f"{address}{number}") for address, count in wanted.items() for number in range(count)]
        within, over = shares.divide(wishes)
        assert sorted(within + over) == sorted(what for _, _, what in wishes)
        got.update(what[0] for what in within)
        clock.now += 0.05
    least = min(wanted, key=lambda address: wanted[address])
    assert got[least] == wanted[least] * rounds
    if len(set(wanted.values())) == 1:
        assert got == {address: count * rounds for address, count in wanted.items()}


def test_a_thousand_entries_get_one_share() -> None:
    """An address with a thousand entries gets about as many copies as one with a single entry that wants as much."""
    clock, got = Clock(), Counter[str]()
    shares = behind(clock)
    for _ in range(1000):
        within, _ = shares.divide([*(("many", 1, "many") for _ in range(1000)), ("one", 1, "one")])
        got.update(within)
        clock.now += 0.001
    assert got["one"] == 1000
    assert got["many"] < 2100


def test_nobody_is_limited_while_there_is_time() -> None:
    """Without a loss, and after one while nothing waits, everybody gets everything; in time the watch ends."""
    clock, wishes = Clock(), [("a", 100, "a"), ("b", 1, "b")]
    shares = FairShares[str](clock)
    assert not shares.watching
    shares = behind(clock)
    assert shares.watching
    assert shares.divide(wishes)[0] == ["a", "b"]
    assert shares.divide(wishes) == (["b"], ["a"])
    wait(shares, clock, 0.0)
    assert shares.divide(wishes) == (["b"], ["a"])  # messages waited already
    clock.now += 2 * IDLE_SECONDS
    wait(shares, clock, 0.0)
    assert shares.divide(wishes) == (["b"], ["a"])  # a report took its time, and messages waited meanwhile
    wait(shares, clock)
    assert shares.divide(wishes) == (["a", "b"], [])
    clock.now += ALERT_SECONDS
    assert not shares.watching
