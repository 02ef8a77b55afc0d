import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.bus.bodies.nodes_message import Node, Nodes, NodeState
from shared.client import Client, Place, Resume, Source
from shared.serving_nodes import (
    BRING_SECONDS,
    RESUME_SECONDS,
    SILENT_SECONDS,
    TOGETHER_SECONDS,
    Owners,
    nodes_serving,
    owner_of,
)
from tests.builders import make_client

NAMES = [f"collector-{number}" for number in range(3000)]
PLACES = [Place("messages", "uplink.1", 7, 0, 500), Place("other", "uplink.1", 7, 0, 9)]


class Clock:
    """A clock that a test sets."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def told(majority: bool = True, **states: NodeState) -> Nodes:
    """The nodes as the uplink of `a` tells of them."""
    all_states: dict[str, NodeState] = {"a": "live", **states}
    live = tuple(name for name, state in all_states.items() if state == "live")
    serving = {name: () if state == "joining" else tuple(sorted({name, *live})) for name, state in all_states.items()}
    nodes = [
        Node(name, state, 0, 0, 33, {"relay": PLACES}, serving=serving[name]) for name, state in all_states.items()
    ]
    return Nodes(majority, nodes, live)


def owners(minority: str = "serve") -> tuple[Owners, Clock]:
    """The node `a` of three."""
    clock = Clock()
    return Owners("a", ("a", "b", "c"), minority, clock), clock  # type: ignore[arg-type]


def clients(count: int = 60) -> dict[str, Client]:
    """Collectors of one stream."""
    return {name: make_client(name, streams=("messages",)) for name in NAMES[:count]}


@given(st.sets(st.sampled_from("abcdef"), min_size=2), st.data())
def test_only_collectors_of_a_node_that_goes_move(nodes: set[str], data: st.DataObject) -> None:
    """A node that goes leaves its collectors to the others; no collector of theirs moves. It gets the same back."""
    gone = data.draw(st.sampled_from(sorted(nodes)))
    for name in NAMES[:300]:
        before, after = owner_of(name, nodes), owner_of(name, nodes - {gone})
        assert after != gone
        assert before == gone or after == before


def test_each_node_gets_its_share() -> None:
    """Collectors are spread evenly over the nodes, and so are those of one that goes."""
    for nodes in ("abc", "abcdefgh"):
        counts = [sum(owner_of(name, nodes) == node for name in NAMES) for node in nodes]
        assert min(counts) > 0.8 * len(NAMES) / len(nodes)
    left = [name for name in NAMES if owner_of(name, "abc") == "a"]
    assert 0.35 < sum(owner_of(name, "bc") == "b" for name in left) / len(left) < 0.65


@pytest.mark.parametrize("site", ["", "berlin"])
def test_without_nodes_this_host_serves_all(site: str) -> None:
    """A host that is no node has nothing to wait for, and takes nothing over, however often collectors change."""
    alone = Owners(site, (), "serve", Clock())
    assert alone.known
    assert not alone.check()
    for _ in range(4):
        assert alone.split(clients(), "relay") == (clients(), {})


def test_exactly_one_node_serves_each_collector() -> None:
    """Three nodes that know the same share all collectors without asking each other."""
    shares = []
    for own in "abc":
        each = Owners(own, "abc", "serve", Clock())
        assert not each.known
        each.note(told(b="live", c="live"))
        own_clients, others = each.split(clients(), "relay")
        assert own_clients | others == clients()
        shares.append(own_clients)
    assert sorted(name for share in shares for name in share) == sorted(clients())


def test_members_of_a_group_have_one_owner() -> None:
    """A group's members share by a hash that has to know all of them: one node serves them all."""
    found, _ = owners()
    found.note(told(b="live", c="live"))
    members = {name: make_client(name, streams=("messages",), group="g") for name in NAMES[:20]}
    assert len({found.owner(client) for client in members.values()}) == 1


def test_a_collector_that_one_node_reaches_stays_there() -> None:
    """A collector at a loopback address is served by its node alone, whoever lives."""
    found, _ = owners()
    found.note(told(b="live", c="live"))
    pinned = {node: make_client(f"at {node}", streams=("messages",), node=node) for node in "abc"}
    assert set(found.split(pinned, "relay")[0]) == {"a"}
    found.note(told(b="silent", c="silent"))
    assert set(found.split(pinned, "relay")[0]) == {"a"}


@pytest.mark.parametrize("state", ["silent", "left"])
def test_collectors_of_a_node_that_is_gone_resume_where_it_was(state: NodeState) -> None:
    """A collector that is taken over goes on where its last node has got to, of its streams; own ones go on as ever."""
    found, clock = owners()
    found.note(told(b="live", c="live"))
    own, others = found.split(clients(), "relay")
    assert found.note(told(b=state, c="live"))
    after, _ = found.split(clients(), "relay")
    taken = after.keys() - own
    assert taken
    assert taken == {name for name in others if owner_of(name, "abc") == "b" and owner_of(name, "ac") == "a"}
    assert {after[name].resume for name in taken} == {Resume(0, places=(PLACES[0],), twice_until_ns=33)}
    assert all(after[name].resume is None for name in own)
    assert found.split(clients(), "relay")[0] == after
    clock.now += RESUME_SECONDS
    found.note(told(b=state, c="live"))
    assert found.check()
    assert all(client.resume is None for client in found.split(clients(), "relay")[0].values())


def test_a_node_that_is_silent_for_long_was_where_it_was_heard_last() -> None:
    """Two nodes die, so nobody serves; one comes back when the uplink knows no more where the other one was."""
    found, _ = owners("hold")
    found.note(told(b="live", c="live"))
    found.split(clients(), "relay")
    found.note(msgspec.structs.replace(told(majority=False, b="silent", c="silent"), serving=()))
    assert not found.split(clients(), "relay")[0]
    further: dict[Source, list[Place]] = {"relay": [msgspec.structs.replace(PLACES[0], total=900)]}
    late = Node("b", "silent", 16_000, 0, 33, further, serving=("a", "b", "c"))
    healed = told(c="live")
    found.note(msgspec.structs.replace(healed, nodes=[*healed.nodes, late]))
    after, _ = found.split(clients(), "relay")
    of_b = [client for name, client in after.items() if owner_of(name, "abc") == "b"]
    assert {client.resume.places for client in of_b if client.resume} == {(PLACES[0],)}


def test_a_collector_that_has_just_come_resumes_nothing() -> None:
    """A collector that signs up, or signs up anew, begins with what comes from then on."""
    found, _ = owners()
    found.note(told(b="live", c="live"))
    found.split(clients(), "relay")
    found.note(told(b="silent", c="live"))
    anew = {
        name: make_client(name, streams=("messages",), generation=client.generation + 1)
        for name, client in clients(90).items()
    }
    assert all(client.resume is None for client in found.split(anew, "relay")[0].values())


@pytest.mark.parametrize("asked", [None, Resume(5)])
def test_a_collector_that_signs_up_anew_after_it_was_taken_over_gets_what_it_asks_for(asked: Resume | None) -> None:
    """The place of its last node does not matter any more: all behind it would come again, and nothing before it."""
    found, _ = owners()
    for b in "live", "silent":
        found.note(told(b=b, c="live"))
        own, _others = found.split(clients(), "relay")
    assert any(client.resume for client in own.values())
    anew = {name: msgspec.structs.replace(client, generation=2, resume=asked) for name, client in clients().items()}
    assert {client.resume for client in found.split(anew, "relay")[0].values()} == {asked}


def test_nodes_that_serve() -> None:
    """Those that live serve while most are heard; else those as before, at a start all; or none."""
    silent = told(majority=False, b="silent", c="silent")
    assert nodes_serving(told(b="live", c="joining"), "hold", ("a",)) == ("a", "b")
    assert nodes_serving(silent, "serve", ("a", "b")) == ("a", "b")
    assert nodes_serving(silent, "serve", None) == ("a", "b", "c")
    assert nodes_serving(silent, "hold", ("a", "b")) == ()


def test_a_node_without_majority_serves_its_own_as_before() -> None:
    """A node whose uplink says nothing serves what it had, and from a start on what is its own when all live."""
    found, clock = owners()
    clock.now += SILENT_SECONDS
    assert found.check()
    assert found.serving == ("a", "b", "c")
    found.note(told(b="live", c="silent"))
    before = found.split(clients(), "relay")
    clock.now += SILENT_SECONDS
    assert not found.check()
    assert found.split(clients(), "relay") == before
    assert not found.majority


def test_a_node_without_majority_can_hold() -> None:
    """With `hold` a node whose uplink says nothing serves none; healed, it goes on where it has left off.

    So it is as the others tell that they have not served without it.
    """
    found, clock = owners("hold")
    found.note(told(b="live", c="live"))
    own, _ = found.split(clients(), "relay")
    clock.now += SILENT_SECONDS
    assert found.check()
    assert found.split(clients(), "relay")[0] == {}
    found.note(told(b="live", c="live"))
    healed, _ = found.split(clients(), "relay")
    assert healed.keys() == own.keys()
    resumes = [client.resume for client in healed.values()]
    assert {(each.generation, each.places, each.twice_until_ns > 33) for each in resumes if each} == {(1, (), True)}
    assert None not in resumes


def test_a_node_that_holds_until_it_has_the_majority_takes_over_where_the_dead_node_was() -> None:
    """A moment in which nobody serves does not hide where collectors of the node that has died have got to.

    Its own collectors go on where it has left off itself, which its senders know.
    """
    found, _ = owners("hold")
    found.note(told(b="live", c="left"))
    own, others = found.split(clients(), "relay")
    silent = told(majority=False, b="silent", c="left")
    found.note(msgspec.structs.replace(silent, serving=()))
    assert found.split(clients(), "relay")[0] == {}
    found.note(told(b="silent", c="left"))
    after, _ = found.split(clients(), "relay")
    assert after.keys() == clients().keys()
    assert {after[name].resume for name in others} == {Resume(0, places=(PLACES[0],), twice_until_ns=33)}
    resumes = [after[name].resume for name in own]
    assert {(resume.generation, resume.places) for resume in resumes if resume} == {(1, ())}
    assert None not in resumes


def test_what_nobody_served_is_owed_by_whoever_serves_it_soon() -> None:
    """Of nodes that start together one joins first: what came before it did is not known to be sent by it yet.

    So the next one does not go on at that one's place at once, but where it has itself begun to keep what came.
    """
    later = (PLACES[0],)
    for before, seconds, places in (1.0, 1.0, ()), (1.0, BRING_SECONDS, later), (TOGETHER_SECONDS, 0.0, later):
        found, clock = owners()
        found.note(told(a="joining", b="joining", c="joining"))
        found.split(clients(), "relay")
        clock.now += before
        found.note(told(a="joining", b="live", c="joining"))
        found.split(clients(), "relay")
        clock.now += seconds
        found.note(told(b="live", c="joining"))
        resumes = [client.resume for client in found.split(clients(), "relay")[0].values()]
        assert {(each.generation, each.places) for each in resumes if each} == {(not places, places)}
        assert None not in resumes


def test_the_past_that_a_collector_was_owed_is_owed_still_once_somebody_serves() -> None:
    """All nodes are started again while a collector catches up: the registry knows from where on, and that is before.

    What came of its other streams until then is owed, too.
    """
    found, _ = owners()
    behind = make_client("siem", streams=("messages", "other"), resume=Resume(5, 1, (PLACES[0],), ("messages",)))
    for state in "joining", "live":
        found.note(told(a=state, b="joining", c="joining"))
        served, _others = found.split({"siem": behind}, "relay")
    resume = served["siem"].resume
    assert resume is not None
    assert resume == Resume(5, 1, (PLACES[0],), twice_until_ns=resume.twice_until_ns)
    assert resume.twice_until_ns > 0


def test_a_collector_of_a_node_that_has_told_no_place_begins_where_it_was_heard_of() -> None:
    """A node that is not heard, or runs no sender, tells no place: what it may not have sent is sent, and counted."""
    found, _ = owners()
    silent = [Node("a", "live"), Node("b", "silent"), Node("c", "silent")]
    found.note(Nodes(False, silent, ("a", "b", "c")))
    own, _ = found.split(clients(), "relay")
    found.note(Nodes(True, silent, ("a",)))
    after, _ = found.split(clients(), "relay")
    resumes = [after[name].resume for name in after.keys() - own]
    assert {(resume.generation, resume.places) for resume in resumes if resume} == {(1, ())}
    assert None not in resumes


def heard_by_a(own: NodeState, *others: Node) -> Nodes:
    """The nodes as the uplink of `a` tells of them, which has the majority."""
    nodes = [Node("a", own), *others]
    return Nodes(True, nodes, Nodes(True, nodes).live)


def node_with(name: str, total: int, *serving: str, state: NodeState = "live") -> Node:
    """A node that has got so far, and takes these to serve."""
    return Node(name, state, 0, 0, total, {"relay": [Place("messages", "uplink.1", 7, 0, total)]}, 0, serving)


@pytest.mark.parametrize("heard", [True, False])
def test_a_collector_goes_on_where_the_node_was_that_others_know_to_have_served_it(heard: bool) -> None:
    """Links heal one after the other: a node hears `b` alone, and `b` tells that `c` serves, too.

    What `c` has served goes on at the place of `c`; while that is not known, where this node itself has left off.
    """
    found, clock = owners()
    found.note(told(b="live", c="live"))
    found.split(clients(), "relay")
    found.note(told(False, b="silent", c="silent"))
    found.split(clients(), "relay")
    c = node_with("c", 700, "b", "c") if heard else node_with("c", 100, "a", "b", "c", state="silent")
    found.note(heard_by_a("joining", node_with("b", 900, "b", "c"), c))
    found.split(clients(), "relay")
    clock.now += 1.0
    for own, total in ("joining", 901), ("live", 902):
        found.note(heard_by_a(own, node_with("b", total, "a", "b", "c"), c))  # type: ignore[arg-type]
    after = found.split(clients(), "relay")[0]
    assert after.keys() == {name for name in clients() if owner_of(name, "abc" if heard else "ab") == "a"}
    for name, client in after.items():
        resume = client.resume
        assert resume is not None
        if owner_of(name, "bc") == "b":
            assert [place.total for place in resume.places] == [901]
        elif heard:
            assert [place.total for place in resume.places] == [700]
        else:
            assert (resume.generation, resume.places) == (client.generation, ())


def test_a_collector_goes_on_where_it_was_left_if_the_node_that_is_heard_has_left_it_to_one_that_is_not() -> None:
    """`b` served all, and leaves some to `c`, which is not heard: it has told where it was before it had them.

    What this node has served itself goes on where it has left off.
    """
    found, clock = owners()
    c = node_with("c", 100, "a", "b", "c")
    found.note(heard_by_a("live", node_with("b", 100, "a", "b", "c"), c))
    found.split(clients(), "relay")
    for seconds, own, total, serving in (9, "joining", 900, "b"), (9, "joining", 901, "bc"), (1, "live", 902, "ab"):
        clock.now += seconds
        silent = msgspec.structs.replace(c, state="silent", age_ms=int(1000 * (clock.now - 100)))
        found.note(heard_by_a(own, node_with("b", total, *serving), silent))  # type: ignore[arg-type]
        after = found.split(clients(), "relay")[0]
    assert after.keys() == {name for name in clients() if owner_of(name, "ab") == "a"}
    for name, client in after.items():
        assert client.resume is not None
        of_c = [] if owner_of(name, "abc") == "a" else [100]
        totals = [place.total for place in client.resume.places]
        assert totals == (of_c if owner_of(name, "bc") == "c" else [901])


def test_a_collector_that_two_nodes_have_served_goes_on_where_either_was() -> None:
    """Two nodes that did not hear each other have both served a collector, each what it got: none of it is missed.

    Both live, and have sent more since they told that.
    """
    found, _ = owners()
    b, c = node_with("b", 900, "b"), node_with("c", 700, "c")
    found.note(heard_by_a("joining", b, c))
    found.split(clients(), "relay")
    found.note(heard_by_a("live", b, c))
    resumes = [client.resume for client in found.split(clients(), "relay")[0].values()]
    assert {(each.places[0].total, each.twice_until_ns > 900) for each in resumes if each} == {(700, True)}
    assert None not in resumes


@pytest.mark.parametrize(("state", "counted"), [("silent", False), ("joining", True)])
def test_a_node_that_was_parted_has_served_for_a_while(state: NodeState, counted: bool) -> None:
    """A node that holds since it hears nobody has sent more than it has told; one that has died has not."""
    found, _ = owners()
    for b in node_with("b", 500, "a", "b"), node_with("b", 500, state=state):
        found.note(heard_by_a("live", b))
        served = found.split(clients(), "relay")[0]
    resumes = [client.resume for name, client in served.items() if owner_of(name, "ab") == "b"]
    assert {(each.places[0].total, each.twice_until_ns > 500) for each in resumes if each} == {(500, counted)}
    assert None not in resumes


def test_a_node_that_serves_nobody_tells_no_place() -> None:
    """A node that holds, or joins, keeps what comes and sends none of it: who follows it goes on where it left off."""
    found, _ = owners()
    for b in node_with("b", 500, "a", "b"), node_with("b", 900, state="joining"), node_with("b", 950, state="silent"):
        found.note(heard_by_a("live", b))
        served = found.split(clients(), "relay")[0]
    resumes = [client.resume for name, client in served.items() if owner_of(name, "ab") == "b"]
    assert {resume.places[0].total for resume in resumes if resume} == {500}
    assert None not in resumes


def test_a_node_that_is_about_to_serve_has_served_nobody_yet() -> None:
    """A node tells that it lives before it knows among which: its place is then what it has had, and has not sent."""
    found, _ = owners()
    found.note(told(b="live", c="live"))
    own, _ = found.split(clients(), "relay")
    found.note(heard_by_a("live", node_with("b", 900), node_with("c", 900)))
    found.note(heard_by_a("live", node_with("b", 900, state="silent"), node_with("c", 900, state="silent")))
    after, _ = found.split(clients(), "relay")
    resumes = [after[name].resume for name in after.keys() - own]
    assert {place.total for resume in resumes if resume for place in resume.places} == {500}
