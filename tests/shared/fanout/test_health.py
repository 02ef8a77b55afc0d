from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.fanout.health import CAUSES, EXAMINE_SECONDS, Checkup
from shared.ledger.counters import SENT
from shared.ledger.equations import lost

OTHERS = ("sent", "bytes", "filtered", "dropped_rate_limited", "dropped_source_refused", "dropped_other_family")


class Looked:
    """A collector that is looked at in time."""

    def __init__(self) -> None:
        self.account: Counter[str] = Counter()
        self.now = 1000.0
        self.since = 0.0
        self._checkup = Checkup()

    @property
    def lost(self) -> int:
        """The number known to have reached nobody."""
        return self._checkup.lost

    def look(self, *, unreachable: int = False, **grown: int) -> str:
        """The word after counters have grown; "" when there is none."""
        self.account.update(grown)
        self.now += EXAMINE_SECONDS
        symptom = self._checkup.examine(self.account, self.now, unreachable=bool(unreachable))
        if symptom is None:
            return ""
        self.since = symptom.since
        return symptom.trouble


@pytest.mark.parametrize(("cause", "word"), CAUSES.items())
def test_each_cause_has_its_word_and_then_is_over(cause: str, word: str) -> None:
    """A cause makes its word at the next look, with since when, and two quiet looks end it."""
    looked = Looked()
    assert looked.look(sent=5) == ""
    assert looked.look(sent=1, **{cause: 3}) == word
    assert looked.since == looked.now
    assert looked.look(sent=1, **{cause: 4}) == word
    assert looked.lost == 7
    assert looked.since == looked.now - EXAMINE_SECONDS
    assert looked.look(sent=1) == word
    assert looked.look(sent=1) == ""
    assert looked.look(sent=1, **{cause: 1}) == word
    assert looked.since == looked.now


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_not_the_collectors_fault_is_no_trouble(name: str) -> None:
    """Drops by policy, or for the kind of datagram, say nothing of the collector."""
    looked = Looked()
    assert looked.look(**{name: 100}) == ""


@pytest.mark.parametrize("name", ["dropped_eperm", "dropped_eio", "dropped_of_tomorrow"])
def test_an_error_that_nobody_thought_of_is_a_trouble_while_nothing_is_delivered(name: str) -> None:
    """A collector is unreachable where all fails, for any cause, until something is delivered."""
    looked = Looked()
    assert looked.look(sent=9) == ""
    assert looked.look(**{name: 3}) == "unreachable"
    assert looked.lost == 3
    assert {looked.look() for _ in range(9)} == {"unreachable"}
    assert [looked.look(sent=1), looked.look(sent=1)] == ["unreachable", ""]
    assert looked.look(sent=9, **{name: 1}) == ""


def test_unreachable_by_icmp_lasts_while_nothing_is_sent() -> None:
    """Only sending tells whether a firewall still refuses: until then the last answer holds."""
    looked = Looked()
    looked.look(sent=1, unreachables=1)
    assert {looked.look() for _ in range(50)} == {"unreachable"}
    assert [looked.look(sent=1), looked.look()] == ["unreachable", ""]


def test_refusing_lasts_while_nothing_is_sent() -> None:
    """A closed port answers only who sends: until something was delivered and not refused it is taken for closed."""
    looked = Looked()
    looked.look(sent=1, refusals=1)
    assert {looked.look() for _ in range(50)} == {"refusing"}
    assert looked.look(sent=1) == "refusing"
    assert looked.look() == ""


def test_unreachable_lasts_while_there_is_no_way() -> None:
    """Without a way a collector is unreachable though nothing is sent to it, and is well soon after there is one."""
    looked = Looked()
    assert [looked.look(unreachable=True) for _ in range(9)] == ["unreachable"] * 9
    assert looked.lost == 0
    assert [looked.look(), looked.look()] == ["unreachable", ""]


def test_the_gravest_trouble_is_told() -> None:
    """Of several troubles the gravest is told; the others show when it is over, if they last."""
    looked = Looked()
    assert looked.look(dropped_buffer_full=1) == "slow"
    assert looked.look(dropped_buffer_full=1, dropped_refused=1) == "refusing"
    assert looked.look(unreachable=True, dropped_buffer_full=1) == "unreachable"
    for _ in range(3):
        last = looked.look(dropped_buffer_full=1, sent=1)
    assert last == "slow"
    assert looked.lost == 7


def test_a_trouble_that_comes_and_goes_is_one() -> None:
    """A trouble at every other look does not flap."""
    looked = Looked()
    words = [looked.look(sent=1, dropped_buffer_full=number % 2) for number in range(1, 40)]
    assert set(words) == {"slow"}


steps = st.dictionaries(st.sampled_from([*CAUSES, *OTHERS]), st.integers(0, 3), max_size=4)


@given(st.lists(st.tuples(st.booleans(), steps), max_size=30))
def test_never_a_word_without_its_cause_and_always_an_end(history: list[tuple[bool, dict[str, int]]]) -> None:
    """A word has had its cause since it began, and it ends with the cause."""
    looked = Looked()
    grown: Counter[tuple[float, str]] = Counter()
    for unreachable, counters in history:
        word = looked.look(unreachable=unreachable, **counters)
        for name, count in counters.items():
            if name in CAUSES:
                grown[looked.now, CAUSES[name]] += count
        assert word in {"", *CAUSES.values()}
        assert looked.lost == lost(looked.account)
        assert word == "unreachable" or not unreachable
        if word:
            counted = sum(count for (at, of), count in grown.items() if of == word and at >= looked.since)
            assert counted or word == "unreachable"
        elif any(name in CAUSES and count for name, count in counters.items()):
            pytest.fail("a cause without a word")
    last = [looked.look(**{SENT: 1}) for _ in range(3)][-1]
    assert last == ""
