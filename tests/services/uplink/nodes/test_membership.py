from contextlib import suppress

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.uplink.nodes.beats import (
    MAX_BEAT,
    MAX_ORIGINS,
    Beat,
    Reached,
    State,
    beat_subject,
    parse_beat,
    unparse_beat,
)
from services.uplink.nodes.membership import SILENT_SECONDS, VOTE_SECONDS, Membership


class Clock:
    """A clock that a test sets."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def beat(node: str, number: int, state: State = "live", boot: int = 1) -> Beat:
    """A beat without places."""
    return Beat(node, boot, number, state, number, {})


def members(*nodes: str) -> tuple[Membership, Clock]:
    """The node `a` among these, which all live."""
    clock = Clock()
    found = Membership("a", ("a", *nodes), clock)
    found.state = "live"
    for node in nodes:
        assert found.note(beat(node, 1))
    return found, clock


def test_a_node_that_is_silent_does_not_live() -> None:
    """A node lives for as long as its beats come, and again once they do."""
    found, clock = members("b", "c")
    assert found.live == ["a", "b", "c"]
    clock.now += SILENT_SECONDS - 0.1
    found.note(beat("b", 2))
    clock.now += 0.2
    assert (found.live, found.state_of("c"), found.majority) == (["a", "b"], "silent", True)
    found.note(beat("c", 1, boot=2))
    assert found.live == ["a", "b", "c"]


def test_an_old_beat_changes_nothing() -> None:
    """A beat that comes late, twice, of this node itself or of a stranger is not taken."""
    found, _ = members("b")
    found.note(beat("b", 5, "left"))
    assert not any(found.note(each) for each in (beat("b", 5), beat("b", 4), beat("a", 9), beat("stranger", 1)))
    assert (found.live, found.state_of("b")) == (["a"], "left")


@pytest.mark.parametrize(
    ("others", "silent", "majority"),
    [(1, 0, True), (1, 1, False), (2, 1, True), (2, 2, False), (3, 1, True), (3, 2, False), (4, 2, True)],
)
def test_majority(others: int, silent: int, majority: bool) -> None:
    """A node that misses half of the nodes or more is not in the majority, unless JetStream acknowledges."""
    nodes = tuple("bcde"[:others])
    found, clock = members(*nodes)
    clock.now += SILENT_SECONDS + 1
    for node in nodes[silent:]:
        found.note(beat(node, 2))
    assert found.majority is majority
    found.note_vote()
    assert found.majority
    clock.now += VOTE_SECONDS
    assert found.majority is majority


def test_an_acknowledgement_is_over_before_a_node_is_missed() -> None:
    """A node that is cut off from all at one moment never takes itself for the majority."""
    found, clock = members("b", "c")
    found.note_vote()
    clock.now += SILENT_SECONDS
    assert found.live == ["a"]
    assert not found.majority


def test_who_has_left_is_not_missed() -> None:
    """Two nodes of three may leave in order: the third then serves all."""
    found, clock = members("b", "c")
    for node in "bc":
        found.note(beat(node, 2, "left"))
    clock.now += 60
    assert (found.live, found.majority) == (["a"], True)


@pytest.mark.parametrize(
    ("payload", "told"),
    [
        (b"", "no beat"),
        (b"\xc1", "no beat"),
        (b"\x91" * 100_000, "no beat"),
        (unparse_beat(beat("c", 1)), "the beat names another node than its subject: c on fanwire-node.b"),
        (b"x" * (MAX_BEAT + 1), "no beat has so many bytes: 524289"),
    ],
)
def test_what_is_no_beat_of_its_subject_is_refused(payload: bytes, told: str) -> None:
    """A node can't speak for another one, and bytes that are no beat are refused."""
    with pytest.raises(ValueError, match=told):
        parse_beat(beat_subject("b"), payload)


@given(st.binary(max_size=200))
def test_any_bytes_do_no_harm(payload: bytes) -> None:
    """Any bytes on the subject of a beat are a beat, or refused."""
    with suppress(ValueError):
        assert parse_beat(beat_subject("b"), payload).node == "b"


def test_the_largest_beat_is_taken() -> None:
    """A beat with as many origins as a node tells of is read, also with long names."""
    reached = [
        Reached("berlin-west", "ingest.16", 1 << 61, f"flows.of.customer.{index}", 1 << 50)
        for index in range(MAX_ORIGINS)
    ]
    sent = Beat("b", 1 << 61, 1, "live", 1, {"relay": reached, "original": reached})
    assert parse_beat(beat_subject("b"), unparse_beat(sent)) == sent


def test_a_beat_comes_as_it_was_sent() -> None:
    """A beat is read as it was."""
    sent = msgspec.structs.replace(beat("b", 7, "joining"), missed={"a": 3}, serving=("b", "c"))
    assert parse_beat(beat_subject("b"), unparse_beat(sent)) == sent


def test_a_beat_of_an_earlier_release_is_taken() -> None:
    """Nodes are upgraded one by one: a beat that tells of no missed nodes, or not which serve, is read."""
    sent = beat("b", 7)
    for lacking in 1, 2:
        before = msgspec.msgpack.encode(msgspec.msgpack.decode(unparse_beat(sent))[:-lacking])
        assert parse_beat(beat_subject("b"), before) == sent
