from hypothesis import given
from hypothesis import strategies as st

from shared.bus.continuity import MAX_GAP, MAX_POSITIONS, Continuity
from tests.builders import make_envelope

TOPIC = "datagrams/messages/"
ORIGIN = ("ingest.1", 1, TOPIC)


def test_first_message_begins_without_a_loss() -> None:
    """Datagrams published before we began to follow a sender are not missed."""
    continuity = Continuity()
    assert continuity.observe(TOPIC, make_envelope(70, 1000), 10) == 0
    assert continuity.positions[ORIGIN].baseline == 1000
    assert continuity.positions[ORIGIN].taken == 10


def test_gap_is_what_was_published_meanwhile() -> None:
    """A gap counts the datagrams of the lost messages, not the messages."""
    continuity = Continuity()
    continuity.observe(TOPIC, make_envelope(0, 0), 10)
    assert continuity.observe(TOPIC, make_envelope(3, 25), 5) == 15
    assert continuity.observe(TOPIC, make_envelope(4, 30), 5) == 0
    position = continuity.positions[ORIGIN]
    assert (position.baseline, position.taken, position.missed, position.reached) == (0, 20, 15, 35)


def test_lost_mark_is_no_lost_datagram() -> None:
    """A lost message that had no datagrams in it leaves a gap in sequence and none in the count."""
    continuity = Continuity()
    continuity.observe(TOPIC, make_envelope(0, 0), 10)
    assert continuity.observe(TOPIC, make_envelope(2, 10), 1) == 0


def test_repeat_is_told() -> None:
    """A message that came before is a repeat and changes nothing."""
    continuity = Continuity()
    for sequence, total in ((0, 0), (1, 10)):
        continuity.observe(TOPIC, make_envelope(sequence, total), 10)
    for sequence, total in ((1, 10), (0, 0), (2, 10)):
        assert continuity.observe(TOPIC, make_envelope(sequence, total), 10) is None
    assert continuity.observe(TOPIC, make_envelope(2, 20), 0) == 0
    assert continuity.observe(TOPIC, make_envelope(2, 20), 0) is None
    assert continuity.repeated == 4
    assert continuity.positions[ORIGIN].reached == 20


def test_restart_is_no_loss() -> None:
    """A sender that begins again under a new boot id is another origin: its count from zero is no gap, no repeat."""
    continuity = Continuity()
    continuity.observe(TOPIC, make_envelope(9, 900), 10)
    assert continuity.observe(TOPIC, make_envelope(0, 0, boot=2), 10) == 0
    assert continuity.observe(TOPIC, make_envelope(1, 10, boot=2), 10) == 0
    assert continuity.positions[ORIGIN].missed == 0
    assert continuity.repeated == 0


def test_senders_and_topics_are_followed_apart() -> None:
    """Each topic of each sender has a count of its own."""
    continuity = Continuity()
    continuity.observe(TOPIC, make_envelope(0, 0), 10)
    assert continuity.observe("datagrams/traps/", make_envelope(5, 50), 10) == 0
    assert continuity.observe(TOPIC, make_envelope(5, 50, sender="ingest.2"), 10) == 0
    assert len(continuity.positions) == 3


def test_reconcile_finds_the_gap_at_the_end() -> None:
    """A datagram that a sender says it has published and that did not come is missed, once."""
    continuity = Continuity()
    continuity.observe(TOPIC, make_envelope(0, 0), 10)
    assert continuity.reconcile(ORIGIN, 10) == 0
    assert continuity.reconcile(ORIGIN, 25) == 15
    assert continuity.reconcile(ORIGIN, 25) == 0
    assert continuity.observe(TOPIC, make_envelope(2, 25), 5) == 0
    assert continuity.positions[ORIGIN].missed == 15


def test_word_of_an_unknown_origin_is_let_go() -> None:
    """A sender whose datagrams we do not follow has nothing to be missed."""
    assert Continuity().reconcile(ORIGIN, 25) == 0


def test_forgotten_topic_begins_anew() -> None:
    """Datagrams that pass while a topic is not subscribed to are not missed; other topics go on."""
    continuity = Continuity()
    for topic in (TOPIC, "datagrams/traps/"):
        continuity.observe(topic, make_envelope(0, 0), 10)
    continuity.forget(TOPIC)
    assert continuity.observe(TOPIC, make_envelope(50, 500), 10) == 0
    assert continuity.observe("datagrams/traps/", make_envelope(50, 500), 10) == 490


def test_made_up_senders_do_not_fill_memory() -> None:
    """The table is bounded; the longest known origin goes first."""
    continuity = Continuity()
    for boot in range(MAX_POSITIONS + 10):
        continuity.observe(TOPIC, make_envelope(boot=boot), 1)
    assert len(continuity.positions) == MAX_POSITIONS
    assert ("ingest.1", 9, TOPIC) not in continuity.positions
    assert ("ingest.1", 10, TOPIC) in continuity.positions


@given(st.lists(st.tuples(st.integers(0, 256), st.sampled_from(["comes", "lost", "twice", "reports"]))))
def test_taken_and_missed_are_all_that_was_published(history: list[tuple[int, str]]) -> None:
    """Taken and missed add up to published after reconcile, whatever is lost or doubled of a sequence."""
    continuity = Continuity()
    continuity.observe(TOPIC, make_envelope(0, 0), 0)
    total = came = 0
    for sequence, (count, fate) in enumerate(history, 1):
        for _ in range({"lost": 0, "twice": 2}.get(fate, 1)):
            if continuity.observe(TOPIC, make_envelope(sequence, total), count) is not None:
                came += count
        total += count
        if fate == "reports":
            continuity.reconcile(ORIGIN, total)
            assert continuity.positions[ORIGIN].reached == total
    continuity.reconcile(ORIGIN, total)
    position = continuity.positions[ORIGIN]
    assert position.taken == came
    assert position.taken + position.missed == total == position.reached


def test_gap_beyond_belief_begins_anew() -> None:
    """A sender that claims more than anybody could have published is followed anew, and is owed nothing for it."""
    continuity = Continuity()
    continuity.observe(TOPIC, make_envelope(0, 0), 10)
    assert continuity.reconcile(ORIGIN, 10 + MAX_GAP + 1) == 0
    assert continuity.observe(TOPIC, make_envelope(1, 10 + MAX_GAP), 0) == MAX_GAP
    assert continuity.observe(TOPIC, make_envelope(2, 11 + 2 * MAX_GAP), 5) == 0
    assert continuity.positions[ORIGIN].baseline == 11 + 2 * MAX_GAP
    assert continuity.positions[ORIGIN].missed == 0
