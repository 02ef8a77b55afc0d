import pytest

from services.uplink.incoming.arrivals import Key
from services.uplink.nodes.beats import MAX_ORIGINS, Beat, Reached, State, beat_subject, unparse_beat
from services.uplink.nodes.cluster import TOLD_NS, Cluster
from shared.bus.messages import Status
from shared.client import Source
from shared.ledger.accounts import unparse_origin
from tests.builders import make_envelope

BOOT = 5
INGEST = Key("b", "ingest.1", 7, "flows")
HOUR_NS = 3600 * 10**9


class Nodes:
    """The node `a` of two, and the other one as it tells of itself; `now_ns` is the time."""

    def __init__(self, began_ns: int = 0) -> None:
        self.now_ns = began_ns
        self.cluster = Cluster("a", ("a", "b"), "serve", "uplink.1", BOOT, lambda: 0.0, lambda: self.now_ns)
        self._beats = 0

    def beat(self, reached: int, reports: int = 1, state: State = "live") -> None:
        """Let `b` tell that its forwarder has had so many datagrams of its own ingest."""
        self._beats += 1
        places: dict[Source, list[Reached]] = {"relay": [Reached(*INGEST, reached)]}
        self.cluster.take(beat_subject("b"), unparse_beat(Beat("b", 1, self._beats, state, reports, places)))

    def report(self, account: dict[str, int], *, registry: bool = True) -> None:
        """Let the forwarder of `a` tell how far it is in what came from `b`, and that it has a registry."""
        accounts = {unparse_origin("uplink.1", BOOT, "flows"): {"reached": 0, **account}}
        accounts["forwarder"] = {"revision": 0} if registry else {}
        self.cluster.note_status(make_envelope(sender="forwarder.1"), Status("forwarder.1", 1, 0, 1, 0, 1, accounts))

    def publish(self, start: int, stop: int, here: int) -> None:
        """Note datagrams of `b` that came here, behind `here` others."""
        self.cluster.note_published(INGEST, range(start, stop), range(here, here + stop - start))


def test_a_node_follows_once_it_has_what_others_have_sent() -> None:
    """A node does not serve before it has what a sender elsewhere has had: it would send that again."""
    nodes = Nodes()
    nodes.publish(0, 10, 0)
    nodes.beat(20)
    assert not nodes.cluster.follows
    nodes.publish(10, 20, 10)
    assert nodes.cluster.follows


def test_a_node_does_not_follow_while_it_has_nothing_of_what_others_go_on_to_send() -> None:
    """An exporter may have moved while a node was parted: of its new worker all is still to come.

    Of one that has ended before, nothing will ever come.
    """
    nodes = Nodes()
    nodes.beat(20)
    followed = nodes.cluster.follows
    nodes.beat(40, reports=2)
    assert followed
    assert not nodes.cluster.follows
    nodes.publish(0, 20, 0)
    assert not nodes.cluster.follows
    nodes.publish(20, 40, 20)
    assert nodes.cluster.follows


def test_a_node_does_not_wait_for_an_exporter_that_has_sent_nothing() -> None:
    """A sender elsewhere follows a worker since its last report, and there is nothing of it: nothing will come here."""
    nodes = Nodes()
    nodes.cluster.take(beat_subject("b"), unparse_beat(Beat("b", 1, 0, "live", 1, {"relay": []})))
    nodes.beat(0, reports=2)
    assert nodes.cluster.follows
    nodes.beat(1, reports=3)
    assert not nodes.cluster.follows


def test_a_node_follows_where_no_other_one_serves() -> None:
    """Datagrams that are still to come are sent from here alone: there is nobody to get level with."""
    nodes = Nodes()
    nodes.beat(20)
    nodes.beat(40, reports=2, state="joining")
    assert nodes.cluster.follows


@pytest.mark.parametrize("late", [{"baseline": 10}, {"baseline": 4, "dropped_unserved": 6}])
def test_a_node_follows_once_others_have_sent_what_its_senders_lack(late: dict[str, int]) -> None:
    """Datagrams from before a sender here began are sent elsewhere first: nobody else could send them."""
    nodes = Nodes()
    nodes.publish(0, 20, 0)
    nodes.report(late)
    nodes.beat(9)
    assert not nodes.cluster.follows
    nodes.beat(10)
    assert nodes.cluster.follows


def test_a_sender_without_a_registry_does_not_run() -> None:
    """A node may not say that it serves before a sender of copies knows whom: its gateway may come later, or never."""
    nodes = Nodes()
    nodes.report({}, registry=False)
    assert not nodes.cluster.senders_run
    nodes.report({})
    assert nodes.cluster.senders_run


def test_a_node_may_have_got_further_until_a_while_after_its_last_beat() -> None:
    """A sender whose report is late may have sent more than a second brings; it has sent nothing after its end."""
    nodes = Nodes()
    nodes.beat(20)
    nodes.now_ns = 3 * 10**9
    nodes.beat(20)
    assert nodes.cluster.nodes("live", {}).nodes[1].since_ns == nodes.now_ns + TOLD_NS


@pytest.mark.parametrize("first", [1, 60])
def test_a_clock_that_was_set_between_two_starts_makes_no_sender_older(first: int) -> None:
    """A host sets its clock ahead while it starts: its senders have begun just now, and have kept nothing yet.

    Those that have reported for a while before the uplink began do serve already.
    """
    cluster = Cluster("a", ("a", "b"), "serve", "uplink.1", BOOT, lambda: 0.0, lambda: 3600 * 10**9)
    for number in first, 60:
        status = Status("forwarder.1", 1, 0, number, 0, 1, {"forwarder": {"revision": 0}})
        assert cluster.note_status(make_envelope(sender="forwarder.1"), status)
    assert cluster.serves_already == (first == 60)


def test_a_node_that_has_just_begun_lacks_nothing_from_before() -> None:
    """Of an origin that sends nothing any more a new start of another node never hears: it has missed nothing of it."""
    nodes = Nodes()
    nodes.publish(0, 10, 0)
    nodes.report({"reached": 10, "baseline": 0})
    for boot in (1, 2):
        nodes.cluster.take(beat_subject("b"), unparse_beat(Beat("b", boot, 1, "live", 1, {"relay": []})))
    (place,) = nodes.cluster.nodes("live", {}).nodes[1].places["relay"]
    assert (place.total, place.lacked) == (10, 0)


def test_a_node_that_is_heard_first_as_it_begins_lacks_nothing_from_before() -> None:
    """It was away since this node began, which serves already: of workers that have ended by then it never hears."""
    nodes = Nodes()
    nodes.cluster.members.state = "live"
    nodes.publish(500, 510, 0)
    for reports, reached in enumerate((10, 30)):
        accounts = {
            unparse_origin(*each, "flows"): {"reached": reached} for each in (("ingest.1", 9), ("uplink.1", BOOT))
        }
        status = Status("forwarder.1", 1, 0, reports, 0, 1, {**accounts, "forwarder": {"revision": 0}})
        nodes.cluster.note_status(make_envelope(sender="forwarder.1"), status)
    states: tuple[State, ...] = "joining", "live"
    for number, state in enumerate(states):
        nodes.cluster.take(beat_subject("b"), unparse_beat(Beat("b", 1, number, state, 1, {"relay": []})))
    places = nodes.cluster.nodes("live", {}).nodes[1].places["relay"]
    assert [(each.worker, each.total, each.lacked) for each in places] == [("ingest.1", 30, 0), ("uplink.1", 10, 0)]


def test_a_node_that_serves_as_its_new_start_is_heard_first_is_where_the_last_one_was() -> None:
    """It was parted, and went on to serve: what came here since its last start was heard its collectors lack."""
    nodes = Nodes()
    for reports, reached in enumerate((10, 30)):
        accounts = {unparse_origin("ingest.1", 9, "flows"): {"reached": reached}}
        status = Status("forwarder.1", 1, 0, reports, 0, 1, {**accounts, "forwarder": {"revision": 0}})
        nodes.cluster.note_status(make_envelope(sender="forwarder.1"), status)
    told: dict[Source, list[Reached]] = {"relay": [Reached("a", "ingest.1", 9, "flows", 12)]}
    nodes.cluster.take(beat_subject("b"), unparse_beat(Beat("b", 1, 1, "live", 1, told)))
    for boot in (2, 3):
        again = Beat("b", boot, 1, "joining", 1, {"relay": []}, {}, ("a", "b"))
        nodes.cluster.take(beat_subject("b"), unparse_beat(again))
        (place,) = nodes.cluster.nodes("live", {}).nodes[1].places["relay"]
        assert (place.worker, place.total) == ("ingest.1", 12)


def test_a_node_that_was_killed_tells_that_it_has_served_without_another_one() -> None:
    """The last time at which a node missed another one is kept: that one learns of it from its next start."""
    nodes = Nodes()
    for boot, missed_ns in ((1, 0), (2, 5)):
        nodes.cluster.take(beat_subject("b"), unparse_beat(Beat("b", boot, 1, "joining", 1, {}, {"a": missed_ns})))
    assert nodes.cluster.nodes("live", {}).nodes[1].missed == 1


def test_a_node_that_serves_learns_that_one_which_it_hears_first_has_served_too() -> None:
    """Two nodes began while they were parted: what the other one tells first is news to one that serves already."""
    nodes = Nodes()
    nodes.cluster.members.state = "live"
    nodes.cluster.take(beat_subject("b"), unparse_beat(Beat("b", 1, 1, "joining", 1, {}, {"a": 3})))
    assert nodes.cluster.nodes("live", {}).nodes[1].missed == 1


def test_what_a_node_has_missed_before_another_one_began_is_of_no_interest_to_that() -> None:
    """A node served without another one once, and is heard by a later start of that: both have not sent the same."""
    nodes = Nodes(began_ns=4)
    nodes.cluster.members.state = "live"
    nodes.cluster.take(beat_subject("b"), unparse_beat(Beat("b", 1, 1, "joining", 1, {}, {"a": 3})))
    assert nodes.cluster.nodes("live", {}).nodes[1].missed == 0


def test_a_node_tells_by_its_present_clock_when_it_served_without_another_one() -> None:
    """Its clock was ahead, and is set back: what it told by the wrong time does not stay."""
    nodes, told = Nodes(), []
    nodes.cluster.members.state = "live"
    nodes.cluster.members.note_vote()
    times = [2 * HOUR_NS, 2 * HOUR_NS + 1, HOUR_NS, HOUR_NS + 1]
    for nodes.now_ns in times:
        nodes.cluster.nodes("live", {})
        told.append(nodes.cluster.beat().missed["b"])
    assert told == times


@pytest.mark.parametrize("ahead_ns", [-HOUR_NS, HOUR_NS])
def test_a_node_whose_clock_is_another_one_is_taken_wrongly_at_its_first_beat_alone(ahead_ns: int) -> None:
    """Two clocks tell whether it has served without this one since that began. Then each other time is news.

    That may be an earlier one, as its clock was set back. If it tells of none, it has lost what it knew.
    """
    nodes, missed = Nodes(began_ns=2 * HOUR_NS), []
    first, later, earlier = (2 * HOUR_NS + ahead_ns + ns for ns in (0, 1, -1))
    for number, told in enumerate((first, first, later, later, earlier, earlier, 0, 0)):
        nodes.cluster.take(beat_subject("b"), unparse_beat(Beat("b", 1, number, "live", 1, {}, {"a": told})))
        missed.append(nodes.cluster.nodes("live", {}).nodes[1].missed)
    before = int(ahead_ns > 0)
    assert [each - before for each in missed] == [0, 0, 1, 1, 2, 2, 2, 2]


def test_a_node_lacks_all_of_a_worker_here_of_which_it_tells_nothing() -> None:
    """A worker of this host was started while another node was parted: that one has had nothing of it."""
    nodes = Nodes()
    for reports, reached in enumerate((10, 30)):
        accounts = {unparse_origin("ingest.1", 9, "flows"): {"reached": reached, "baseline": 4}}
        status = Status("forwarder.1", 1, 0, reports, 0, 1, {**accounts, "forwarder": {"revision": 0}})
        nodes.cluster.note_status(make_envelope(sender="forwarder.1"), status)
    nodes.beat(0)
    (place,) = nodes.cluster.nodes("live", {}).nodes[1].places["relay"]
    assert (place.worker, place.boot, place.total) == ("ingest.1", 9, 4)


def test_workers_here_that_start_again_and_again_do_not_fill_the_memory() -> None:
    """Each start is an origin of its own, and is told of for as long as others are not too many."""
    nodes = Nodes()
    for boot in range(MAX_ORIGINS + 9):
        for reports, reached in ((2 * boot, 10), (2 * boot + 1, 30)):
            accounts = {unparse_origin("ingest.1", boot, "flows"): {"reached": reached, "baseline": 4}}
            status = Status("forwarder.1", 1, 0, reports, 0, 1, {**accounts, "forwarder": {"revision": 0}})
            nodes.cluster.note_status(make_envelope(sender="forwarder.1"), status)
    assert len(nodes.cluster._growing) == MAX_ORIGINS
    nodes.beat(0)
    assert nodes.cluster.nodes("live", {}).nodes[1].places["relay"][-1].boot == boot
