from types import SimpleNamespace
from typing import cast

from shared.bus.bodies.journal_messages import CatchUpReport
from shared.bus.continuity import Position
from shared.bus.zmq_sockets import Publisher
from shared.client import MAX_PLACES, Place, Resume
from shared.fanout.catch_up.progress import MAX_LEFT, Progress, with_beginnings
from tests.builders import make_client


def test_all_places_are_known_where_a_collector_has_left() -> None:
    """The gateway is told of the last of many streams' places; one that comes back here goes on at all of them.

    What another node may have sent meanwhile is still told apart.
    """
    told: list[CatchUpReport] = []
    played = SimpleNamespace(wanted=lambda _: True, publish=lambda _, report: told.append(report))
    progress = Progress(cast(Publisher, played), "relay")
    places = [Place(f"s{stream}", f"ingest.{worker}", 1, 7, 70, 1) for stream in range(30) for worker in range(4)]
    progress.note_left(make_client("siem", 9, generation=5), 1000, places)
    known = Resume(2000, 5, tuple(places[-MAX_PLACES:]), twice_until_ns=3000)
    assert told[0].behind[0].places == list(known.places)
    assert progress.resume("siem", known) == Resume(1000, 5, tuple(places), twice_until_ns=3000)


def test_the_places_of_all_that_another_node_serves_are_known() -> None:
    """More collectors than are told of again leave this node at once, as it holds: all go on where it left them off.

    Of those that are in no registry any more the last ones are known.
    """
    played = SimpleNamespace(wanted=lambda _: False, publish=None)
    progress = Progress(cast(Publisher, played), "relay")
    clients = [make_client(f"c{number}", 9, generation=5) for number in range(MAX_LEFT + 10)]
    place = Place("messages", "ingest.1", 1, 7, 70, 1)
    for client in clients:
        progress.note_left(client, 1000, [place])
    told = Resume(2000, 5)
    progress.follow(clients)
    assert {progress.resume(client.name, told) for client in clients} == {Resume(1000, 5, (place,))}
    progress.follow(clients[:3])
    known = [client for client in clients if progress.resume(client.name, told).places]
    assert known == [*clients[:3], *clients[-MAX_LEFT:]]


def test_what_a_worker_had_before_it_was_followed_is_owed_from_its_begin() -> None:
    """A worker began before its stream was followed again: what it had until then, nobody has served."""
    followed = {("ingest.1", 2): Position(0, 3, 40, unserved=17), ("uplink.1", 2): Position(0, 0, 9)}
    left = [Place("flows", "ingest.1", 1, 0, 70)]
    assert with_beginnings("flows", left, followed, {}) == ([*left, Place("flows", "ingest.1", 2, 0, 3)], 0)


def test_what_a_ring_has_let_go_of_other_sites_is_lacked_unless_there_is_a_place() -> None:
    """Nobody serves: what comes of other nodes meanwhile is owed. From a place on it is owed anyway."""
    left = [Place("flows", "uplink.1", 1, 0, 70), Place("more", "uplink.1", 2, 0, 5)]
    let_go = {("uplink.1", 1): 90, ("uplink.1", 2): 9, ("ingest.1", 2): 40}
    assert with_beginnings("flows", left, {}, let_go) == (left[:1], 9)
